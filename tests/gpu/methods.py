"""The engines that are compared, as arguments of ``LLM``, and what they are asked to do; all alike
but for what makes the method, which is as ``vllm-dflash bench`` has it."""

from typing import TYPE_CHECKING, Any

from gpu.shapes import Pair
from gpu.starting import Spec

if TYPE_CHECKING:
    from gpu.common import Run

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Tokens for which CUDA graphs are recorded: fewer sizes than vLLM would, so that engines start
sooner, and up to 256 requests' drafts, where vLLM's default ends at 512 tokens."""
RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
"""Else vLLM takes the other runner where something is missing, and says so in its log alone."""
TAU = 4.0
"""Tokens that a verified draft yields, where vLLM decides what is accepted."""
CONTEXT = 256
"""Tokens of a request's prompt, where no other number is named."""
_TINY = {
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "dtype": "float32",
}
"""What the interpreter gets through in seconds."""


def shared(
    tiny: bool,
    *,
    max_model_len: int,
    max_num_seqs: int,
    cache_bytes: int,
    made_up: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Arguments that all engines of a program have; ``more`` are those of a GPU.

    Args:
        made_up: vLLM makes up the weights. On a CPU they are read: there vLLM's own dflash cannot
            do without.
    """
    found: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
    }
    if tiny:
        return found | _TINY
    return (
        found
        | {
            "dtype": "bfloat16",
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": cache_bytes,
            # Engines lie side by side: vLLM refuses to start where less than this is free.
            "gpu_memory_utilization": 0.05,
            "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
        }
        | ({"load_format": "dummy"} if made_up else {})
        | more
    )


def engine(
    method: str,
    pair: Pair,
    args: dict[str, Any],
    *,
    name: str | None = None,
    tau: float | None = None,
    speculative: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Spec:
    """An engine of one of the benchmark's methods: plain, native:7, dflash, adaptive.

    Args:
        name: as the figures call it; the method's, where left out.
        tau: what vLLM's synthetic acceptance yields; a job may change it. None: as drafts deserve.
        speculative: further keys of ``speculative_config``.
    """
    from vllm_dflash.evaluation.methods import Drafter, parse_methods

    (found,) = parse_methods(method, {"own": Drafter(str(pair.drafter), pair.block_size - 1)})
    args = {"model": str(pair.target)} | args | found.engine_args
    if found.speculative_config is not None:
        synthetic: dict[str, Any] = {}
        if tau is not None:
            synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": tau}
        args["speculative_config"] = found.speculative_config | synthetic | (speculative or {})
    return Spec(name or method, args, RUNNER | found.environment | (environment or {}))


def steady(run: "Run", requests: int, tokens: int, **others: Any) -> dict[str, Any]:
    """The job that measures speed with so many requests in flight, none of which generates more
    than ``tokens``; ``others`` than what is here are for a GPU."""
    job = {"do": "steady", "requests": requests, "context": CONTEXT, "acceptance": None}
    job |= {"cold_steps": 40, "steps": 150, "seconds": 2.0, "tokens": tokens} | others
    if run.args.tiny:
        job |= {"context": 16, "cold_steps": 3, "steps": 8, "seconds": 60.0, "tokens": 200}
    return job

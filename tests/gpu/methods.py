"""The engines that are compared, as arguments of ``LLM``; all alike but for what makes the
method."""

from collections.abc import Sequence
from typing import Any

from gpu.shapes import Pair
from gpu.starting import Spec

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Tokens for which CUDA graphs are recorded: fewer sizes than vLLM would, so that engines start
sooner, and up to 256 requests' drafts, where vLLM's default ends at 512 tokens."""
KINDS = ("plain", "native", "dflash", "adaptive", "verification")
"""Without a drafter; vLLM's own dflash; ours with whole drafts; ours with the controller; vLLM's
own with its adaptive verification."""
_OURS = ("dflash", "adaptive")
_TINY = {
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "dtype": "float32",
}
"""What the interpreter gets through in seconds."""


def shared(
    tiny: bool, *, max_model_len: int, max_num_seqs: int, cache_bytes: int, **more: Any
) -> dict[str, Any]:
    """Arguments that all engines of a program have."""
    found: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
    }
    if tiny:
        return found | _TINY | more
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
        | more
    )


def engine(
    kind: str,
    pair: Pair,
    args: dict[str, Any],
    *,
    name: str | None = None,
    k: int | None = None,
    acceptance: float | None = None,
    speculative: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Spec:
    """An engine of one of ``KINDS``.

    Args:
        name: as the figures call it; the kind's, where left out.
        k: draft tokens a step; a whole block where left out.
        acceptance: of each token that is reached, by vLLM's synthetic acceptance; the job may
            change it.
        speculative: further keys of ``speculative_config``.
    """
    switch = {"VLLM_DFLASH": "1" if kind in _OURS else "0"}
    args = {"model": str(pair.target), **args}
    if kind == "plain":
        return Spec(name or kind, args, switch | (environment or {}))
    k = k or pair.block_size - 1
    config: dict[str, Any] = {
        "method": "dflash",
        "model": str(pair.drafter),
        "num_speculative_tokens": k,
    }
    if acceptance is not None:
        config |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": rates(acceptance, k),
        }
    if kind == "verification":
        config["enable_adaptive_verification"] = True
    if kind in _OURS:
        args["additional_config"] = {"dflash": {"adaptive": kind == "adaptive"}}
    args["speculative_config"] = config | (speculative or {})
    return Spec(name or kind, args, switch | (environment or {}))


def rates(acceptance: float, k: int) -> list[float]:
    """The probability that each token and all before it are accepted."""
    return [acceptance ** (i + 1) for i in range(k)]


def expected_tau(acceptance: float, k: int) -> float:
    """Tokens that a verified draft yields."""
    return 1 + sum(rates(acceptance, k))


def acceptance_for(tau: float, k: int) -> float:
    """The acceptance of each token with which a draft of ``k`` yields ``tau``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tau(middle, k) < tau else (low, middle)
    return low


def names(specs: Sequence[Spec]) -> list[str]:
    """Of engines."""
    return [spec.name for spec in specs]

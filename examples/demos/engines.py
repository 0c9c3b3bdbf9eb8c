"""vLLM's ``LLM`` for the demo, and its counters."""

from pathlib import Path
from typing import Any

# One process: on two cores a second one costs more than it brings. Before vLLM is imported.
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
MAX_MODEL_LEN = 1024
KV_CACHE_BYTES = 1 << 28
_COUNTERS = ("num_drafts", "num_accepted_tokens", "num_accepted_tokens_per_pos")


def speculative_config(drafter: Path, tokens: int) -> dict[str, Any]:
    """vLLM's setting."""
    return {"method": "dflash", "model": str(drafter), "num_speculative_tokens": tokens}


def engine(target: Path, speculative: dict[str, Any] | None, *, adaptive: bool, **more: Any) -> Any:
    """An engine in float32; without a drafter where ``speculative`` is None."""
    from vllm import LLM

    return LLM(
        str(target),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        disable_log_stats=False,
        generation_config="vllm",
        use_tqdm_on_load=False,
        additional_config={} if adaptive else {"dflash": {"adaptive": False}},
        **({"speculative_config": speculative} if speculative else {}),
        **more,
    )


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of drafts and accepted tokens, since the engine began."""
    values = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics()}
    return {
        name: getattr(values[name], "value", getattr(values[name], "values", None))
        for name in _COUNTERS
        if name in values
    }

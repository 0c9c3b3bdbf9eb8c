"""V1 runner on a CPU: an engine's steps are measured once its cache of keys and values is there."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patch import Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_METADATA = "vllm.v1.attention.backend:CommonAttentionMetadata"


def _replace(original: Callable[..., Any], measure: Callable[[], None]) -> Callable[..., Any]:
    def initialize_kv_cache(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if not kwargs.get("is_profiling"):
            measure()
        return found

    return initialize_kv_cache


PATCH = Patch(
    target=f"{_RUNNER}.initialize_kv_cache",
    scope="instance",
    needs="optional",
    signatures={
        f"{_RUNNER}.initialize_kv_cache": "self, kv_cache_config, ...",
        f"{_RUNNER}._dummy_run": "self, num_tokens, ...",
    },
    names=(
        f"{_RUNNER}.input_batch",
        f"{_RUNNER}.kv_cache_config",
        f"{_RUNNER}.max_num_tokens",
        f"{_RUNNER}.model",
        "vllm.v1.worker.block_table:BlockTable.block_table",
        "vllm.v1.worker.block_table:MultiGroupBlockTable.block_tables",
        "vllm.v1.kv_cache_interface:KVCacheConfig.num_blocks",
    ),
    why=(
        "what a step costs by its rows and contexts decides how much is drafted, and is measured"
        " where no request waits; vLLM has no hook for a plug-in at an engine's warm-up"
    ),
    until="vLLM lets a plug-in run at warm-up",
    replace=_replace,
)

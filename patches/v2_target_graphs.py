"""V2 runner: where drafting is adaptive, the target's CUDA graphs are for drafts of all lengths."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import drafts_ours, part_of_ours

from vllm_dflash.log import logger
from vllm_dflash.patch import Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if drafts_ours(vllm_config, "speculative_config"):
            kwargs["varlen_decode"] = kwargs.get("varlen_decode") or _can(vllm_config, **kwargs)
        return original(vllm_config, *args, **kwargs)

    return manager


def _can(vllm_config: Any, decode_query_len: int, **_: Any) -> bool:
    from vllm_dflash.adaptive.settings import is_adaptive

    if not is_adaptive(vllm_config):
        return False
    try:
        return bool(
            part_of_ours("vllm_dflash.drafting.varlen", "replays_all_lengths")(
                vllm_config, decode_query_len
            )
        )
    except Exception as error:  # slower, and as right
        logger.warning("CUDA graphs are for whole drafts alone: %s", error)
        return False


_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_BUILDER = "vllm.v1.attention.backend:AttentionMetadataBuilder"
_LAYER = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"

PATCH = Patch(
    target="vllm.v1.worker.gpu.model_runner:ModelCudaGraphManager",
    needs="optional",
    signatures={
        f"{_GRAPHS}:ModelCudaGraphManager.__init__": (
            "self, vllm_config, device, cudagraph_mode, decode_query_len, lora_capture_cases=,"
            " varlen_decode=, ..."
        ),
        f"{_BUILDER}.get_cudagraph_support": "cls, vllm_config, kv_cache_spec",
        f"{_BUILDER}.get_varlen_cudagraph_max_query_len": "cls, vllm_config, kv_cache_spec",
        f"{_LAYER}.get_attn_backend": "self",
        f"{_LAYER}.get_kv_cache_spec": "self, vllm_config",
    },
    names=(f"{_LAYER}.is_draft_layer", "vllm.v1.attention.backend:AttentionCGSupport.ALWAYS"),
    looked_up={
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": (
            "ModelCudaGraphManager",
            "decode_query_len",
        ),
        f"{_GRAPHS}:CudaGraphManager._init_candidates": ("varlen_decode",),
    },
    why=(
        "vLLM records the target's graphs for whole drafts; steps whose drafts are cut, and those"
        " without any, would run its attention without a graph, slower than without a drafter. It"
        " has graphs for all lengths, for its own adaptive verification alone"
    ),
    until="a scheduler can ask for such graphs",
    replace=_replace,
)

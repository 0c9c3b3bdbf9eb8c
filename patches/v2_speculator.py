"""V2 runner: our speculator in the place of vLLM's, for method dflash with our architectures."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead, part_of_ours

from vllm_dflash.patch import Patch


def _init_speculator(
    original: Callable[..., Any], vllm_config: Any, device: Any, req_states: Any
) -> Any:
    return part_of_ours("vllm_dflash.drafting.v2", "DFlashSpeculator")(vllm_config, device)


_BASE = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"
_FLASH = "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder"

PATCH = Patch(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    fingerprints={
        "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator": {
            "0.32": "40630a878a01d16d",
            "0.33": "1872c20ac42a9162",
        }
    },
    signatures={
        "vllm.v1.worker.gpu.spec_decode:init_speculator": "vllm_config, device, req_states",
        f"{_BASE}._build_uniform_attn_metadata": "self, ...",
    },
    names=(
        f"{_BASE}.max_model_len",
        "vllm.config:CUDAGraphMode",
        "vllm.config.compilation:CompilationConfig.cudagraph_capture_sizes",
        "vllm.config.compilation:CompilationConfig.max_cudagraph_capture_size",
        "vllm.config.speculative:SpeculativeConfig.enable_adaptive_verification",
        "vllm.config.speculative:SpeculativeConfig.num_speculative_tokens_per_batch_size",
    ),
    looked_up={
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.__init__": ("init_speculator",),
        # The draft's graphs are chosen by these, and planned for, in copies of the config.
        f"{_GRAPHS}._init_candidates": (
            "cudagraph_capture_sizes",
            "max_cudagraph_capture_size",
            "num_speculative_tokens_per_batch_size",
        ),
        f"{_FLASH}.__init__": ("max_cudagraph_capture_size",),
    },
    why=(
        "the speculator is picked from a list in the function's body; there is no registry to"
        " add to"
    ),
    until="vLLM lets a plug-in register a speculator for a method",
    replace=instead(_init_speculator, "speculative_config"),
)

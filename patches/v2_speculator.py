"""V2 runner: our speculator in the place of vLLM's, for method dflash with our architectures."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead, part_of_ours

from vllm_dflash.patch import Patch


def _init_speculator(
    original: Callable[..., Any], vllm_config: Any, device: Any, req_states: Any
) -> Any:
    return part_of_ours("vllm_dflash.drafting.v2", "DFlashSpeculator")(vllm_config, device)


PATCH = Patch(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    fingerprints={
        "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator": {
            "0.32": "40630a878a01d16d",
            "0.33": "1872c20ac42a9162",
        }
    },
    signatures={
        "vllm.v1.worker.gpu.spec_decode:init_speculator": "vllm_config, device, req_states"
    },
    looked_up={"vllm.v1.worker.gpu.model_runner:GPUModelRunner.__init__": ("init_speculator",)},
    why=(
        "the speculator is picked from a list in the function's body; there is no registry to"
        " add to"
    ),
    until="vLLM lets a plug-in register a speculator for a method",
    replace=instead(_init_speculator, "speculative_config"),
)

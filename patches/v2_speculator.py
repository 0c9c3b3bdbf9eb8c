"""V2 runner: our speculator in the place of vLLM's, for method dflash with our architectures."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patch import Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if is_ours(vllm_config.speculative_config):
            from vllm_dflash.drafting.v2 import DFlashSpeculator

            return DFlashSpeculator(vllm_config, device)
        return original(vllm_config, device, req_states)

    return init_speculator


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
    why=(
        "the speculator is picked from a list in the function's body; there is no registry to"
        " add to"
    ),
    until="vLLM lets a plug-in register a speculator for a method",
    replace=_replace,
)

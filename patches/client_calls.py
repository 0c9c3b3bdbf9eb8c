"""Engine core in a process of its own: which of its client's requests may reach the model is
counted."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.client_calls import CALLS
from vllm_dflash.patch import Patch

_CORE = "vllm.v1.engine.core:EngineCoreProc"


def _handle_client_request(
    original: Callable[..., Any], self: Any, request_type: Any, request: Any
) -> Any:
    CALLS.begin(request_type.name == "UTILITY")
    return original(self, request_type, request)


PATCH = Patch(
    target=f"{_CORE}._handle_client_request",
    needs="optional",
    signatures={f"{_CORE}._handle_client_request": "self, request_type, request"},
    names=(f"{_CORE}.vllm_config", "vllm.v1.engine:EngineCoreRequestType.UTILITY"),
    looked_up={
        f"{_CORE}._process_input_queue": ("_handle_client_request",),
        f"{_CORE}._handle_client_request": ("UTILITY",),
    },
    why=(
        "a hook or a method that a call set on the target's modules is heeded at its next forward;"
        " without this each forward looks at every module, some 50 us of a small model's; no hook"
        " is asked when a call arrives"
    ),
    until="vLLM says when a call from outside has run in a worker",
    replace=instead(_handle_client_request),
)

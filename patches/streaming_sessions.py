"""Scheduler: a streaming-input session goes on after its output's end, also where more drafts were
accepted than its output holds."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch

_REQUEST = "vllm.v1.request:Request"


def _handle_stopped_request(original: Callable[..., bool], self: Any, request: Any) -> bool:
    if request.resumable:
        # The last output token is not computed yet, as without drafts; under asynchronous
        # scheduling placeholders say so already.
        computed = request.num_tokens - 1 + request.num_output_placeholders
        request.num_computed_tokens = min(request.num_computed_tokens, computed)
    return original(self, request)


PATCH = Patch(
    target="vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
    signatures={"vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request": "self, request"},
    fingerprints={
        "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": {
            "0.32": "1b0b5df1ffaa279c",
            "0.33": "d9af168b67737046",
        }
    },
    names=(
        "vllm.v1.core.sched.scheduler:Scheduler.vllm_config",
        f"{_REQUEST}.resumable",
        f"{_REQUEST}.num_tokens",
        f"{_REQUEST}.num_output_placeholders",
        f"{_REQUEST}.num_computed_tokens",
    ),
    why=(
        "under synchronous scheduling (a CPU's) an output that ends among accepted drafts leaves"
        " those after its end counted as computed: a session's next input then keeps the last"
        " output token, and takes the cache of the dropped drafts for its own first tokens' on"
        " 0.32, and ends the engine on 0.33 (with any speculative method); no hook is asked"
    ),
    until="vLLM sets a stopped session back to its last token but one",
    replace=instead(_handle_stopped_request),
)

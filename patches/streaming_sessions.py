"""Scheduler: a streaming-input session goes on after its output's end, also where more drafts were
accepted than its output holds."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patch import Patch


def _replace(original: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(original)
    def handle_stopped_request(self: Any, request: Any) -> bool:
        if is_ours(self.vllm_config.speculative_config) and request.resumable:
            # The last output token is not computed yet, as without drafts; under asynchronous
            # scheduling placeholders say so already.
            computed = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, computed)
        return original(self, request)

    return handle_stopped_request


PATCH = Patch(
    target="vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
    signatures={"vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request": "self, request"},
    fingerprints={
        "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": {
            "0.32": "1b0b5df1ffaa279c",
            "0.33": "d9af168b67737046",
        }
    },
    why=(
        "under synchronous scheduling (a CPU's) an output that ends among accepted drafts leaves"
        " those after its end counted as computed: a session's next input then keeps the last"
        " output token, and takes the cache of the dropped drafts for its own first tokens' on"
        " 0.32, and ends the engine on 0.33 (with any speculative method); no hook is asked"
    ),
    until="vLLM sets a stopped session back to its last token but one",
    replace=_replace,
)

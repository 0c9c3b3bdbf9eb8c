"""Scheduler: a streaming-input session goes on after its output's end, also where more drafts were accepted than its output holds."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(original)
    def handle_stopped_request(self: Any, request: Any) -> bool:
        speculative = self.vllm_config.speculative_config
        if (
            request.resumable
            and speculative is not None
            and speculative.method == "dflash"
            and is_ours(speculative.draft_model_config.architectures)
        ):
            # The last output token is not computed yet, as without drafts; under asynchronous scheduling placeholders say so already.
            computed = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, computed)
        return original(self, request)

    return handle_stopped_request


PATCH = Patch(
    target="vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
    versions=SUPPORTED_VLLM,
    fingerprints={
        "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request": "1543f90989d9761a",
        "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": "1b0b5df1ffaa279c",
        "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output": "ffcaec8de9837fe0",
    },
    why=(
        "under synchronous scheduling (a CPU's) an output that ends among accepted drafts leaves those after its end counted as computed: a "
        "session's next input then keeps the last output token, and takes the cache of the dropped drafts for its own first tokens' (with "
        "any speculative method); no hook is asked"
    ),
    until="vLLM sets a stopped session back to its last token but one",
    replace=_replace,
)

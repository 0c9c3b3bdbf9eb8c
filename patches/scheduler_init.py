"""Scheduler: in an engine with one of our drafters it keeps to what requests say of drafts, and our
recorder watches it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_dflash.patches.request_drafts import limit_drafts

        from vllm_dflash.formats import is_ours
        from vllm_dflash.metrics.engine import attach

        original(self, *args, **kwargs)
        if is_ours(self.vllm_config.speculative_config):
            limit_drafts(self)
            attach(self)

    return init


PATCH = Patch(
    target="vllm.v1.core.sched.scheduler:Scheduler.__init__",
    needs="optional",
    signatures={"vllm.v1.core.sched.scheduler:Scheduler.__init__": "self, vllm_config, ..."},
    why=(
        "what requests say of drafts is kept to, and lengths, steps without drafts and their times"
        " are seen, in the engine's process only; the hook for metrics, a stat logger, runs in the"
        " API server, gets none of them, and is not asked by an offline LLM. Plug-ins are loaded in"
        " EngineCore.__init__, so that is too late a place. A scheduler without one of our drafters"
        " is left as it is"
    ),
    until="vLLM lets a plug-in observe steps in the engine's process",
    replace=_replace,
)

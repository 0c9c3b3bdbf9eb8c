"""Scheduler: in an engine with one of our drafters it keeps to what requests say of drafts, and our
recorder watches it."""

from typing import Any

from vllm_dflash.patches.guard import afterwards

from vllm_dflash.log import logger
from vllm_dflash.patch import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"


def _attach(scheduler: Any) -> None:
    from vllm_dflash.patches.request_drafts import limit_drafts

    limit_drafts(scheduler)
    try:
        from vllm_dflash.metrics.engine import attach

        attach(scheduler)
    except Exception:  # what watches must not end what serves
        logger.exception("metrics of this engine's speculation: left out; serving goes on")


PATCH = Patch(
    target=f"{_SCHEDULER}.__init__",
    needs="optional",
    signatures={f"{_SCHEDULER}.__init__": "self, vllm_config, ..."},
    names=(f"{_SCHEDULER}.vllm_config", f"{_SCHEDULER}.finished_req_ids"),
    why=(
        "what requests say of drafts is kept to, and lengths, steps without drafts and their times"
        " are seen, in the engine's process only; the hook for metrics, a stat logger, runs in the"
        " API server, gets none of them, and is not asked by an offline LLM. Plug-ins are loaded in"
        " EngineCore.__init__, so that is too late a place. A scheduler without one of our drafters"
        " is left as it is"
    ),
    until="vLLM lets a plug-in observe steps in the engine's process",
    replace=afterwards(_attach),
)

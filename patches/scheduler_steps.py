"""Scheduler: its steps are read once, around the methods that begin and end one, for whoever
watches them."""

from typing import Any

from vllm_dflash.patches.place import kept_with

from vllm_dflash.patch import Patch
from vllm_dflash.steps import Observer, Steps

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_KEPT = "_vllm_dflash_steps"
_WHY = (
    "what was verified and accepted, steps without drafts and their times are seen in the engine's"
    " process only, and vLLM has no observer of steps there: controller, metrics and benchmark"
    " watch. No body is touched, so the same holds for every scheduler"
)
_UNTIL = "vLLM lets a plug-in observe an engine's steps"


def _record(name: str, signature: str, replace: Any) -> Patch:
    return Patch(
        target=f"{_SCHEDULER}.{name}",
        scope="instance",
        needs="optional",
        signatures={f"{_SCHEDULER}.{name}": signature},
        why=_WHY,
        until=_UNTIL,
        replace=replace,
    )


PATCHES = (
    _record("schedule", "self, ...", lambda original, steps: steps.around_schedule(original)),
    _record(
        "update_from_output",
        "self, scheduler_output, model_runner_output",
        lambda original, steps: steps.around_update(original),
    ),
    _record("shutdown", "self", lambda original, steps: steps.around_shutdown(original)),
)


def watch(scheduler: Any, observer: Observer) -> bool:
    """Hands ``observer`` each step of vLLM's ``Scheduler``, which is read once however many watch.

    Returns:
        Whether it can be; where not, the log and ``vllm-dflash status`` say why.
    """
    from vllm_dflash.plugin import patch_set

    attached = {patch for patch, _ in kept_with(scheduler)}
    if not attached.issuperset(PATCHES):
        steps = Steps(scheduler)
        if not patch_set().attach(scheduler, PATCHES, steps):
            return False
        setattr(scheduler, _KEPT, steps)
    known: Steps = getattr(scheduler, _KEPT)
    known.add(observer)
    return True

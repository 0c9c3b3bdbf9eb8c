"""Scheduler of an engine with one of our drafters: the metrics' recorder stands around the methods that begin and end a step."""

from typing import Any

from vllm_dflash.patch import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_WHY = (
    "lengths, steps without drafts and their times are seen in the engine's process only, and vLLM has no observer of steps there; "
    "no body is touched, so the same holds for every scheduler"
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
    _record("schedule", "self, ...", lambda original, record: record.watch_schedule(original)),
    _record("update_from_output", "self, scheduler_output, model_runner_output", lambda original, record: record.watch_update(original)),
    _record("shutdown", "self", lambda original, record: record.watch_shutdown(original)),
)

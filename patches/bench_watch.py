"""Benchmark: its watch stands around the end of a step of the engines that it measures, in their own processes alone."""

from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Any, watch: Any, scheduler: Any) -> Any:
    return watch.around(original, scheduler)


_METHOD = "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"

PATCH = Patch(
    target=_METHOD,
    scope="instance",
    signatures={_METHOD: "self, scheduler_output, model_runner_output"},
    needs="optional",
    why="verified and sampled tokens of a request stand side by side only there; vLLM's own counters are compared with what it sees",
    until="vLLM lets a plug-in observe an engine's steps",
    replace=_replace,
)

"""Scheduler: its steps are read once, around the methods that begin and end one, for whoever
watches them."""

from typing import Any

from vllm_dflash.patches.scheduler import SCHEDULER, around, attach_once

from vllm_dflash.steps import Observer, Steps

_KEPT = "_vllm_dflash_steps"
_WHY = (
    "what was verified and accepted, steps without drafts and their times are seen in the engine's"
    " process only, and vLLM has no observer of steps there: controller, metrics and benchmark"
    " watch. No body is touched, so the same holds for every scheduler"
)
_UNTIL = "vLLM lets a plug-in observe an engine's steps"
_OUTPUT = "vllm.v1.core.sched.output:SchedulerOutput"
_READ = (
    *(f"{SCHEDULER}.{name}" for name in ("connector", "requests", "running", "waiting")),
    f"{_OUTPUT}.num_invalid_spec_tokens",
    f"{_OUTPUT}.num_scheduled_tokens",
    f"{_OUTPUT}.num_spec_tokens_to_schedule",
    f"{_OUTPUT}.scheduled_cached_reqs",
    f"{_OUTPUT}.scheduled_new_reqs",
    f"{_OUTPUT}.scheduled_spec_decode_tokens",
    f"{_OUTPUT}.total_num_scheduled_tokens",
    "vllm.v1.core.sched.output:CachedRequestData.num_computed_tokens",
    "vllm.v1.core.sched.output:CachedRequestData.req_ids",
    "vllm.v1.core.sched.output:CachedRequestData.resumed_req_ids",
    "vllm.v1.core.sched.output:NewRequestData.num_computed_tokens",
    "vllm.v1.core.sched.output:NewRequestData.req_id",
    "vllm.v1.outputs:ModelRunnerOutput.req_id_to_index",
    "vllm.v1.outputs:ModelRunnerOutput.sampled_token_ids",
)
"""Of a step, by whoever watches."""


PATCHES = tuple(
    around(name, signature, replace, names=_READ, why=_WHY, until=_UNTIL)
    for name, signature, replace in (
        ("schedule", "self, ...", lambda original, steps: steps.around_schedule(original)),
        (
            "update_from_output",
            "self, scheduler_output, model_runner_output",
            lambda original, steps: steps.around_update(original),
        ),
        ("shutdown", "self", lambda original, steps: steps.around_shutdown(original)),
    )
)


def watch(scheduler: Any, observer: Observer) -> bool:
    """Hands ``observer`` each step of vLLM's ``Scheduler``, which is read once however many watch.

    Returns:
        Whether it can be; where not, the log and ``vllm-dflash status`` say why.
    """
    steps = attach_once(scheduler, PATCHES, _KEPT, lambda: Steps(scheduler))
    if steps is not None:
        steps.add(observer)
    return steps is not None

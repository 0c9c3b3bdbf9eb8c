"""Scheduler: of a request's draft no more is kept than its user allows, and a step whose requests
all want none drafts nothing."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patches.adaptive_scheduler import cut_placeholders, plan_drafts
from vllm_dflash.patches.scheduler import SCHEDULER, around, attach_once

from vllm_dflash.request_limits import Limits

_OUTPUT = "vllm.v1.core.sched.output"
_KEPT = "_vllm_dflash_limits"
_READ = (
    f"{SCHEDULER}.requests",
    f"{SCHEDULER}.num_spec_tokens",
    f"{SCHEDULER}.parallel_config",
    f"{_OUTPUT}:SchedulerOutput.finished_req_ids",
    f"{_OUTPUT}:SchedulerOutput.num_scheduled_tokens",
    f"{_OUTPUT}:SchedulerOutput.num_spec_tokens_to_schedule",
    f"{_OUTPUT}:SchedulerOutput.scheduled_new_reqs",
    f"{_OUTPUT}:NewRequestData.req_id",
    f"{_OUTPUT}:NewRequestData.sampling_params",
    "vllm.config.parallel:ParallelConfig.data_parallel_size",
    "vllm.sampling_params:SamplingParams.extra_args",
    "vllm.v1.request:Request.spec_token_ids",
)
_WHY = (
    "how much is drafted is vLLM's to say for a whole step, by no request; drafts of a request"
    " stand in its spec_token_ids from there on: tokens under synchronous scheduling, places for"
    " them under asynchronous"
)
_UNTIL = "vLLM has such a sampling parameter"


def _around_schedule(original: Callable[..., Any], scheduler: Any, limits: Limits) -> Any:
    # The ranks of data parallelism have to draft alike, so there K of a step stays.
    may_plan = scheduler.parallel_config.data_parallel_size == 1

    @wraps(original)
    def update_after_schedule(scheduler_output: Any) -> None:
        limits.learn(scheduler_output)
        if limits.by_request and may_plan:
            most = limits.most_of(scheduler_output.num_scheduled_tokens)
            if most < scheduler_output.num_spec_tokens_to_schedule:
                plan_drafts(scheduler_output, most)
        original(scheduler_output)
        _cut(scheduler, limits)

    return update_after_schedule


def _around_drafts(original: Callable[..., Any], scheduler: Any, limits: Limits) -> Any:
    @wraps(original)
    def update_draft_token_ids(draft_token_ids: Any) -> None:
        original(draft_token_ids)
        _cut(scheduler, limits)

    return update_draft_token_ids


def _cut(scheduler: Any, limits: Limits) -> None:
    for request_id, most in limits.by_request.items():
        request = scheduler.requests.get(request_id)
        if request is not None and len(request.spec_token_ids) > most:
            cut_placeholders(request, request.spec_token_ids[:most])


PATCHES = tuple(
    around(name, signature, replace, names=_READ, why=_WHY, until=_UNTIL)
    for name, signature, replace in (
        ("_update_after_schedule", "self, scheduler_output", _around_schedule),
        ("update_draft_token_ids", "self, draft_token_ids", _around_drafts),
    )
)


def limit_drafts(scheduler: Any) -> None:
    """Has vLLM's ``Scheduler`` keep to what its requests' users allow. Where that cannot be, such
    requests are refused (``request_params.py``)."""
    attach_once(scheduler, PATCHES, _KEPT, lambda: Limits(scheduler.num_spec_tokens), scheduler)


def limits_of(scheduler: Any) -> Limits:
    """Those that a scheduler keeps to; empty where it keeps to none."""
    found: Limits | None = getattr(scheduler, _KEPT, None)
    return Limits(scheduler.num_spec_tokens) if found is None else found

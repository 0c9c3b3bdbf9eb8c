"""vLLM's scheduler, asking the controller how much to draft in each step and how much of each draft to verify.

It measures what steps take, from the end of one to the end of the next, and what becomes of drafts. K goes to the model runner in
the scheduler's output. Under synchronous scheduling (a CPU's) drafts come back with the drafter's confidence in each token and are
cut here; under asynchronous scheduling the next step is planned before they are known, and they are cut by what the request and the
position have been accepted before. Limits: not with data parallelism.

    pytest tests/engine/test_adaptive.py
"""

import math
import time
from typing import Any

from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.cost import Work
from vllm_dflash.compat import num_drafted
from vllm_dflash.drafts import confidences_of
from vllm_dflash.patches.adaptive_scheduler import cut_drafts, cut_placeholders, plan_drafts

_MEASURED_EVERY = 4
"""Steps without drafts of which one is measured."""


_LONGEST_GAP = 0.25
"""Of a step's time, what may lie between the last step's end and its beginning."""


class _Adaptive(Scheduler):
    """What both schedulers add to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        draft_config = self.vllm_config.speculative_config.draft_model_config.hf_config
        self.controller = Controller(self.num_spec_tokens, draft_config.block_size, self._temperature_class)
        self.plan = Plan(self.num_spec_tokens)
        """Of the step that was scheduled last."""
        self._confidences: dict[str, list[float]] = {}
        self._last_end: float | None = None
        self._steps = 0
        self._drafted = False
        """Whether the last step did."""

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        num_reqs = len(scheduler_output.num_scheduled_tokens)
        all_decode = scheduler_output.total_num_scheduled_tokens == num_reqs and not scheduler_output.scheduled_new_reqs
        standing = self.controller.standing(num_reqs) if all_decode and num_reqs else None
        if num_drafted(scheduler_output) == 0:
            standing = Plan(0)  # no request of the step can use drafts
        elif standing is None:
            drafting, num_context = self._drafting(scheduler_output)
            standing = self.controller.plan(drafting, num_context) if drafting else Plan(0)
        self.plan = standing
        plan_drafts(scheduler_output, self.plan.num_draft_tokens)
        if scheduler_output.finished_req_ids:
            self.controller.forget(scheduler_output.finished_req_ids)
            for request_id in scheduler_output.finished_req_ids:
                self._confidences.pop(request_id, None)
        super()._update_after_schedule(scheduler_output)

    def _temperature_class(self, request_id: str) -> int:
        """Requests whose drafts are accepted alike: greedy ones, and sampled ones by steps of a half."""
        request = self.requests.get(request_id)
        params = None if request is None else request.sampling_params
        return 0 if params is None or params.sampling_type == SamplingType.GREEDY else min(math.ceil(2 * params.temperature), 4)

    def _drafting(self, scheduler_output: SchedulerOutput) -> tuple[list[str], int]:
        """The requests of a step that sample a token, and so can draft, and the positions of their contexts in all."""
        drafting, num_context = [], 0
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            end = request.num_computed_tokens + num_tokens
            if end >= request.num_tokens:
                drafting.append(request_id)
                num_context += end
        return drafting, num_context

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        self._steps += 1
        drafts = num_drafted(scheduler_output) > 0
        catches_up, self._drafted = drafts and not self._drafted, drafts
        if self._steps % _MEASURED_EVERY and self._is_plain(scheduler_output):
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            self._last_end = time.perf_counter() if self.running or self.waiting else None
            return outputs
        work, outcomes = self._outcomes(scheduler_output, model_runner_output)
        stands_for = _MEASURED_EVERY if self._is_plain(scheduler_output) else 1
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        now = time.perf_counter()
        began = self._began(now)
        self.controller.observe(
            None if began is None else work, now - (began or now), outcomes, self._confidences or None, stands_for, catches_up
        )
        self._last_end = now if self.running or self.waiting else None
        return outputs

    def _began(self, now: float) -> float | None:
        """When the step began that ends ``now``; None where that is not known."""
        # With nothing left to do the engine waits, and the time to the next step's end is not that step's.
        return self._last_end

    def _is_plain(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether a step neither drafts nor verifies, as it does not look best to: of such steps one in a few tells enough."""
        return not num_drafted(scheduler_output) and not scheduler_output.scheduled_spec_decode_tokens and self.plan.why == "best"

    def _outcomes(self, scheduled: SchedulerOutput, ran: ModelRunnerOutput) -> tuple[Work | None, dict[str, tuple[int, int]]]:
        """What the step computed (None where it was not all decoding), and by request its verified and its accepted draft tokens."""
        outcomes: dict[str, tuple[int, int]] = {}
        all_decode, num_context = bool(scheduled.num_scheduled_tokens), 0
        drafts, invalid = scheduled.scheduled_spec_decode_tokens, scheduled.num_invalid_spec_tokens or {}
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request, verified = self.requests.get(request_id), len(drafts.get(request_id, ()))
            if request is None or request.is_finished():
                all_decode = False
                continue
            all_decode &= request.num_output_tokens > 0 and num_tokens == 1 + verified
            num_context += request.num_computed_tokens
            if verified and ran.sampled_token_ids:
                sampled = ran.sampled_token_ids[ran.req_id_to_index[request_id]]
                # Tokens that a grammar forbids were not the drafter's to get right.
                outcomes[request_id] = (verified - invalid.get(request_id, 0), max(len(sampled) - 1, 0))
        if not all_decode:
            return None, outcomes
        num_reqs, k = len(scheduled.num_scheduled_tokens), num_drafted(scheduled)
        return Work(
            num_reqs, scheduled.total_num_scheduled_tokens, num_reqs * self.controller.block_size if k else 0, num_context
        ), outcomes


class AdaptiveScheduler(_Adaptive):
    """For synchronous scheduling."""

    _scheduled_at = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._scheduled_at = time.perf_counter()
        return super().schedule(*args, **kwargs)

    def _began(self, now: float) -> float | None:
        # What comes between two steps, such as the handling of outputs, is part of a step's cost; a longer wait was somebody else's.
        last, own = self._last_end, now - self._scheduled_at
        return self._scheduled_at if last is None or self._scheduled_at - last > _LONGEST_GAP * own else last

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        drafts, confidences = draft_token_ids.draft_token_ids, confidences_of(draft_token_ids.draft_token_ids)
        if not drafts or not drafts[0]:
            return  # a request that was scheduled has no draft from before
        request_ids = draft_token_ids.req_ids
        self._confidences = {} if confidences is None else dict(zip(request_ids, confidences, strict=False))
        lengths = self.controller.lengths(request_ids, self.plan, self._confidences or None)
        cut_drafts(draft_token_ids, [draft[: lengths[request_id]] for request_id, draft in zip(request_ids, drafts, strict=False)])
        super().update_draft_token_ids(draft_token_ids)


class AdaptiveAsyncScheduler(_Adaptive, AsyncScheduler):
    """For asynchronous scheduling: vLLM reserves a place for every draft token that it will verify, here for as many as are worth it."""

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        lengths = self.controller.lengths(list(scheduler_output.num_scheduled_tokens), self.plan)
        for request_id, length in lengths.items():
            request = self.requests[request_id]
            if len(request.spec_token_ids) > length:
                cut_placeholders(request, request.spec_token_ids[:length])

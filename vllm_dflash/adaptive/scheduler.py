"""vLLM's scheduler, asking the controller how much to draft in each step and how much of each draft
to verify.

What the controller learns from comes by the record of each step (``vllm_dflash/steps.py``). K goes
to the model runner in the scheduler's output. Under synchronous scheduling (a CPU's) drafts come
back with the drafter's confidence in each token and are cut here; under asynchronous scheduling the
next step is planned before they are known, and they are cut by what the request and the position
have been accepted before. Limits: not with data parallelism.

    pytest tests/engine/test_adaptive.py
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.learner import Learner
from vllm_dflash.compat import num_drafted
from vllm_dflash.cost_profile import GUESS
from vllm_dflash.drafts import Planned, confidences_of
from vllm_dflash.engine_profiles import adapts, profile_for
from vllm_dflash.log import logger
from vllm_dflash.patches.adaptive_scheduler import cut_drafts, cut_placeholders, plan_drafts
from vllm_dflash.patches.request_drafts import limits_of
from vllm_dflash.patches.scheduler_steps import watch

_UNKNOWN = (
    "what steps cost was not measured, so drafting is not adaptive and drafts are whole:"
    ' --additional-config \'{"dflash": {"adaptive": true}}\' begins with a guess, false has it'
    " stay off without this line"
)
_GUESSED = "what steps cost was not measured, so adaptive drafting begins with a guess of it"


class _Adaptive(Scheduler):
    """What both schedulers add to vLLM's."""

    _is_synchronous = True

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.adapts = adapts(vllm_config)
        """Whether the controller plans steps; metrics ask when vLLM's own part begins."""
        super().__init__(vllm_config, *args, **kwargs)
        device = self.vllm_config.device_config.device_type
        self._skips = self._is_synchronous and device == "cpu"
        """Whether a step can draft for some of its requests only."""
        draft_config = self.vllm_config.speculative_config.draft_model_config.hf_config
        self._limits = limits_of(self)
        profile = profile_for(self.vllm_config)
        self.controller = Controller(
            self.num_spec_tokens,
            draft_config.block_size,
            self._group,
            self._limits.most,
            self._context,
            profile,
            skips=self._skips,
        )
        self._learner = Learner(self.controller, self._is_synchronous)
        self._confidences: dict[str, list[float]] = {}
        if not self.adapts:
            logger.warning(_UNKNOWN)
        elif profile is GUESS:
            logger.warning(_GUESSED)
        if not (self.adapts and watch(self, self._learner)):
            self._learner.close()

    def draft_whole(self) -> None:
        """Has every draft be whole, and verified whole, from now on: as without a controller."""
        self._learner.close()

    @property
    def plan(self) -> Plan:
        """Of the step that was scheduled last."""
        return self._learner.plan

    @property
    def confidences(self) -> Mapping[str, Sequence[float]] | None:
        """By request, those of the draft that its step verifies; None where they are not known."""
        return (not self._learner.is_closed and self._confidences) or None

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if not self._learner.is_closed:
            whole = scheduler_output.num_spec_tokens_to_schedule
            try:
                self._choose(scheduler_output)
            except Exception:  # what chooses must not end what serves
                logger.exception("%s: ended here, as it failed; serving goes on", Learner.what)
                self._learner.close()
                plan_drafts(scheduler_output, whole)
        if self._learner.is_closed:  # nothing is learned: whole drafts, as without a controller
            self._learner.plan = Plan(num_drafted(scheduler_output))
        super()._update_after_schedule(scheduler_output)

    def _choose(self, scheduler_output: SchedulerOutput) -> None:
        """Plans the step."""
        num_reqs = len(scheduler_output.num_scheduled_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_rows = num_reqs + (sum(map(len, drafts.values())) if drafts else 0)
        all_decode = (
            scheduler_output.total_num_scheduled_tokens == num_rows
            and not scheduler_output.scheduled_new_reqs
        )
        plan = self.controller.kept_plan(num_reqs) if all_decode and num_reqs else None
        if num_drafted(scheduler_output) == 0:
            plan = Plan(0)  # no request of the step can use drafts
        elif plan is None:
            drafting = self._drafting(scheduler_output)
            plan = self.controller.plan(drafting) if drafting else Plan(0)
        self._learner.schedule(scheduler_output, plan)
        k = plan.num_draft_tokens
        if plan.skipped and self._skips:
            k = Planned(k, plan.skipped & scheduler_output.num_scheduled_tokens.keys())
        plan_drafts(scheduler_output, k)
        if scheduler_output.finished_req_ids:
            self.controller.acceptance.forget(scheduler_output.finished_req_ids)
            for request_id in scheduler_output.finished_req_ids:
                self._confidences.pop(request_id, None)

    def _group(self, request_id: str) -> tuple[int, int]:
        """Requests whose drafts are accepted alike: greedy ones, and sampled ones by steps of a
        half; apart by the draft tokens that their users allow."""
        request = self.requests.get(request_id)
        params = None if request is None else request.sampling_params
        warmth = (
            0
            if params is None or params.sampling_type == SamplingType.GREEDY
            else min(math.ceil(2 * params.temperature), 4)
        )
        return warmth, self._limits.most(request_id)

    def _context(self, request_id: str) -> int:
        """Positions of a request's context."""
        request = self.requests.get(request_id)
        return 0 if request is None else request.num_tokens

    def _drafting(self, scheduler_output: SchedulerOutput) -> list[str]:
        """The requests of a step that sample a token, and so can draft."""
        return [
            request_id
            for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items()
            if (request := self.requests[request_id]).num_computed_tokens + num_tokens
            >= request.num_tokens
        ]


class AdaptiveScheduler(_Adaptive):
    """For synchronous scheduling."""

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        drafts, request_ids = draft_token_ids.draft_token_ids, draft_token_ids.req_ids
        if not any(drafts):
            return  # a request that was scheduled has no draft from before
        if self._learner.is_closed:
            super().update_draft_token_ids(draft_token_ids)
            return
        said = confidences_of(drafts)
        self._confidences = dict(zip(request_ids, said, strict=False)) if said else {}
        lengths = self.controller.lengths(request_ids, self._learner.plan, self._confidences)
        each = zip(drafts, lengths.values(), strict=False)
        cut_drafts(draft_token_ids, [draft[:length] for draft, length in each])
        super().update_draft_token_ids(draft_token_ids)


class AdaptiveAsyncScheduler(_Adaptive, AsyncScheduler):
    """For asynchronous scheduling: vLLM reserves a place for every draft token that it will verify,
    here for as many as are worth it."""

    _is_synchronous = False

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self._learner.is_closed:
            return
        lengths = self.controller.lengths(list(scheduler_output.num_scheduled_tokens), self.plan)
        for request_id, length in lengths.items():
            request = self.requests[request_id]
            if len(request.spec_token_ids) > length:
                cut_placeholders(request, request.spec_token_ids[:length])

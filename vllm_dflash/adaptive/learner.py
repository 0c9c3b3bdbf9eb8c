"""What the controller learns from steps: their times, what became of drafts, and which steps tell
enough to be looked at. Pure.

pytest tests/unit/test_adaptive_learner.py
"""

from collections import deque
from typing import Any

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.cost_profile import Work
from vllm_dflash.drafts import skipped_of
from vllm_dflash.steps import Step


class Learner:
    """Watches an engine's steps for its controller."""

    what = "adaptive drafting"

    def __init__(self, controller: Controller, is_synchronous: bool) -> None:
        self.controller, self._is_synchronous = controller, is_synchronous
        self.plan = Plan(controller.max_draft)
        """Of the step that was scheduled last."""
        self._plans: deque[tuple[Any, Plan]] = deque()
        """Of the steps that run, with vLLM's ``SchedulerOutput`` of each."""
        self.is_closed = False
        """Nothing more is learned; where that is a failure, what was is not to be trusted
        either."""
        self._drafted = False
        """Whether the last step did."""

    def close(self) -> None:
        """See ``Observer``."""
        self.is_closed = True
        self._plans.clear()

    def schedule(self, scheduled: Any, plan: Plan) -> None:
        """A step was planned."""
        self.plan = plan
        self._plans.append((scheduled, plan))

    def observe(self, step: Step) -> None:
        """Takes in a step; of those that neither draft nor verify, as is best, the last ones before
        a choice: that tells enough."""
        plan, before = self._plan_of(step.scheduled), self._drafted
        self._drafted = step.num_drafted > 0
        # Under asynchronous scheduling a step's output is handed on before its draft runs: the time
        # up to it holds the draft of the step before.
        drafts = self._drafted if self._is_synchronous else before
        if (
            not drafts
            and plan.why == "best"
            and not step.scheduled.scheduled_spec_decode_tokens
            and not self.controller.is_pending
        ):
            return
        began = self._began(step)
        # Its time tells how long decoding takes only where it was all decoding.
        is_exact = began is not None and step.all_decode and not step.num_ended
        self.controller.observe(
            self._work(step, drafts) if is_exact else None,
            step.ended - (began or step.ended),
            step.verified,
            step.confidences,
            plan,
            self._is_synchronous and drafts and not before,
        )

    def _plan_of(self, scheduled: Any) -> Plan:
        """With which a step was scheduled: under asynchronous scheduling later ones are planned
        by the time it has run."""
        while self._plans:
            theirs, plan = self._plans.popleft()
            if theirs is scheduled:
                return plan
        return self.plan

    def _began(self, step: Step) -> float | None:
        """When it began; None where that is not known. What comes between two steps, such as the
        handling of outputs, is part of a step's cost; a wait longer than it was somebody else's."""
        if not self._is_synchronous:
            return None if step.after_pause else step.began
        began, scheduled = step.began, step.scheduled_at
        is_wait = step.after_pause or began is None or scheduled - began > step.ended - scheduled
        return scheduled if is_wait else began

    def _work(self, step: Step, drafts: bool) -> Work:
        """What was computed in a step's time."""
        count, num_context = len(step.scheduled.num_scheduled_tokens), step.num_context
        drafting, seen, block = count, num_context, drafts * self.controller.block_size
        if drafts and (skipped := skipped_of(step.num_planned)):
            contexts = [n for name, n in step.contexts.items() if name not in skipped]
            drafting, seen = len(contexts), sum(contexts)
        return Work(
            count,
            step.scheduled.total_num_scheduled_tokens,
            drafting * block,
            num_context,
            step.num_attended,
            seen * block,
        )

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

_MEASURED_EVERY = 4
"""Steps without drafts of which one is measured."""
_LONGEST_GAP = 0.25
"""Of a step's time, what may lie between the last step's end and its beginning."""


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
        self._steps = 0
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
        """Takes in a step, and of those that neither draft nor verify, as is best, one in a few:
        that tells enough."""
        self._steps += 1
        plan, before = self._plan_of(step.scheduled), self._drafted
        self._drafted = step.num_drafted > 0
        # Under asynchronous scheduling a step's output is handed on before its draft runs: the time
        # up to it holds the draft of the step before.
        drafts = self._drafted if self._is_synchronous else before
        writes_backlog = self._is_synchronous and drafts and not before
        if (
            self._steps % _MEASURED_EVERY
            and not drafts
            and not step.scheduled.scheduled_spec_decode_tokens
            and plan.why == "best"
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
            writes_backlog,
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
        """When it began; None where that is not known."""
        if not self._is_synchronous:
            return None if step.after_pause else step.began
        # What comes between two steps, such as the handling of outputs, is part of a step's cost; a
        # longer wait was somebody else's.
        if (
            step.after_pause
            or step.began is None
            or step.scheduled_at - step.began > _LONGEST_GAP * (step.ended - step.scheduled_at)
        ):
            return step.scheduled_at
        return step.began

    def _work(self, step: Step, drafts: bool) -> Work:
        """What was computed in a step's time."""
        count, num_context = len(step.scheduled.num_scheduled_tokens), step.num_context
        drafting, seen, block = count, num_context, self.controller.block_size
        if not drafts:
            block = 0
        elif skipped := skipped_of(step.num_planned):
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

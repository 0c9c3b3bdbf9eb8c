"""What the controller learns from steps: their times, what became of drafts, and which steps tell
enough to be looked at. Pure.

pytest tests/unit/test_adaptive_learner.py
"""

from typing import Any

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.steps import Step


class Learner:
    """Watches an engine's steps for its controller."""

    what = "adaptive drafting"

    def __init__(self, controller: Controller, is_synchronous: bool) -> None:
        self.controller, self._is_synchronous = controller, is_synchronous
        self.plan = Plan(controller.max_draft)
        """Of the step that was scheduled last."""
        self._plans: dict[int, Plan] = {}
        """Of the steps that run, by the identity of vLLM's ``SchedulerOutput``."""
        self.is_closed = False
        """Nothing more is learned; where that is a failure, what was is not to be trusted
        either."""
        self._drafted = False
        """Whether the last step did."""

    def close(self) -> None:
        """See ``Observer``."""
        self.is_closed = True

    def schedule(self, scheduled: Any, plan: Plan) -> None:
        """A step was planned."""
        self.plan = self._plans[id(scheduled)] = plan

    def observe(self, step: Step) -> None:
        """Takes in what became of drafts, and how long the step took where that is of use."""
        # Under asynchronous scheduling later steps are planned by the time that one has run. Its
        # output is handed on before its draft runs: the time up to it holds the draft before.
        plan, before = self._plans.pop(id(step.scheduled), self.plan), self._drafted
        self._drafted = step.num_drafted > 0
        drafts = self._drafted if self._is_synchronous else before
        is_measured = self.controller.measures(plan)
        if not (is_measured or step.verified):
            return
        began = step.decoding_began(self._is_synchronous)
        # Its time tells how long decoding takes only where it was all decoding.
        is_exact = is_measured and began is not None and step.all_decode and not step.num_ended
        work = step.work(drafts * self.controller.block_size) if is_exact else None
        # No backlog under asynchronous scheduling, where the draft in question ran before.
        seconds, backlog = step.ended - (began or step.ended), drafts and not before
        self.controller.observe(work, seconds, step.verified, step.confidences, plan, backlog)

"""Whether to draft in a step, for which requests, and how many of each one's draft tokens to
verify: as many as commit the most tokens a second. Pure.

A block is drafted whole or not at all, for a shorter one costs little less and drafts worse.
Verifying commits one token a request, and each draft token with the probability that it and all
before it are accepted (``Acceptance``); what a step takes, ``StepCost`` knows. A token is verified
if it brings more than its row at its request's context takes, at the rate of the whole.

What does not look best is tried now and then, for two steps. What a trial has lost decides when the
next comes: so late that it was ``Tuning.exploration`` of the time, and never later than after 3
``block_size`` / ``exploration`` steps with about as many requests, whatever was measured.

    pytest tests/unit/test_adaptive.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences, GroupOf, LimitOf, Outcomes
from vllm_dflash.adaptive.cost import StepCost
from vllm_dflash.adaptive.tuning import TUNING, Tuning
from vllm_dflash.cost_profile import GUESS, Profile, fill_rows, power
from vllm_dflash.steps import Names, Work


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and which of it to verify in the next."""

    num_draft_tokens: int
    """K of the step: all, or 0 for no drafter forward."""
    threshold: float = 0.0
    """A draft token is worth verifying if it is accepted with a probability above ..."""
    price: float = 0.0
    """... and this much more for each position of its request's context."""
    skipped: frozenset[str] = frozenset()
    """The requests that have nothing to gain."""
    why: str = "best"
    """``best`` by what is known, or ``trial`` of what does not look best."""
    seconds: float = 1.0
    """Expected of a step."""
    rate: float = 0.0
    """Expected committed tokens a second."""


@dataclass
class Size:
    """What is kept for about as many requests."""

    steps: int = 0
    """Without those of trials."""
    choice: int = 0
    """The step of the next one."""
    trial: float = 0.0
    """Of the next one; the first is due at once, and free."""
    tried: int = 0
    """Of the last one."""
    lost: float = 0.0
    """Steps that this has lost."""


@dataclass
class Controller:
    """Learns from steps and plans the next."""

    max_draft: int
    """Tokens of a draft."""
    block_size: int
    """The drafter's rows for it."""
    group: GroupOf = lambda _: None
    limit: LimitOf = None
    context: Callable[[str], int] = lambda _: 0
    """Positions of a request's."""
    profile: Profile = GUESS
    """Of steps as they were measured at warm-up."""
    tuning: Tuning = TUNING
    skips: bool = True
    """Whether requests that have nothing to gain cost no rows of the drafter's."""

    def __post_init__(self) -> None:
        self.cost = StepCost(self.profile, self.tuning)
        self.acceptance = Acceptance(self.max_draft, self.tuning, self.group, self.limit)
        self.best: Plan | None = None
        self.num_reqs, self.now = 0, Size()
        """Of the last choice."""
        self._sizes: dict[int, Size] = {}
        self._weighed: tuple[Names, tuple[Plan, Plan]] | None = None
        """Requests and their plans, as long as nothing was learned since."""
        self._rest: list[Plan] = []
        """What is left of a trial."""

    def measures(self, plan: Plan) -> bool:
        """Whether what a step of this plan takes is of use: in trials, in the last steps before
        one, and in the last one before a choice."""
        now, window = self.now, self.tuning.window
        first = min(now.choice, max(now.choice, now.trial) - window)
        return plan.why == "trial" or now.steps >= first

    def observe(
        self,
        work: Work | None,
        seconds: float,
        outcomes: Outcomes,
        confidences: Confidences = None,
        plan: Plan | None = None,
        writes_backlog: bool = False,
    ) -> None:
        """Learns from a step.

        Args:
            work: what the step computed; None where its time tells nothing, as with a prompt in it.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
            confidences: of those draft tokens, where known.
            plan: that the step was scheduled with.
            writes_backlog: whether it is the first that drafts after some that did not, and writes
                the context of them all.
        """
        best, now, tuning, block = self.best, self.now, self.tuning, self.block_size
        self.acceptance.learn(outcomes, confidences)
        is_trial = plan is not None and plan.why == "trial"
        self._weighed = None if outcomes or is_trial else self._weighed
        if plan and is_trial and best and now.tried:
            lost = plan.seconds * (1 - plan.rate / best.rate)
            if work:
                tokens = work.num_reqs + sum(accepted for _, accepted in outcomes.values())
                lost = seconds - tokens / best.rate
            # Never more than the rows of its three steps would take as plain steps of their own.
            now.lost = min(now.lost + lost / best.seconds, 3 * block)
            now.trial = now.tried + max(tuning.every, now.lost / tuning.exploration)
        # One that verifies and does not draft is between two plans.
        is_pure = work and (work.draft_rows or work.num_tokens == work.num_reqs)
        if work and is_pure and not writes_backlog and (plan is None or self.measures(plan)):
            self.cost.observe(work, seconds)

    def plan(self, requests: Names) -> Plan:
        """What to draft for these requests, which all decode."""
        num_reqs, every = len(requests), self.tuning.every
        if (kept := self.kept_plan(num_reqs)) is not None:
            return kept
        if self._rest:
            return self._rest.pop()
        self.now.steps += 1
        self.now = now = self._sizes.setdefault(power(num_reqs), Size())
        if self._weighed is None or self._weighed[0] != requests:
            self._weighed = requests, self._weigh(requests)
        best, other = sorted(self._weighed[1], key=lambda plan: -plan.rate)
        self.best, self.num_reqs = best, num_reqs
        now.choice = now.steps + min(every, now.steps)
        if now.steps < now.trial:
            return best
        now.tried, now.trial, now.lost = now.steps, now.steps + every, 0.0
        # The first that drafts brings contexts up to date, only the second is like those that would
        # follow; the last verifies what the second drafted.
        self._rest = [replace(best, why="trial"), replace(other, why="trial")]
        return self._rest[1]

    def kept_plan(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen
        yet; else None, and ``plan`` is to be asked."""
        is_other = num_reqs != self.num_reqs and power(num_reqs) != power(self.num_reqs)
        if is_other or self._rest or self.now.steps >= self.now.choice:
            return None
        self.now.steps += 1
        return self.best

    def lengths(self, requests: Names, plan: Plan, said: Confidences = None) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are
        drafted."""
        if not plan.num_draft_tokens:
            return dict.fromkeys(requests, 0)
        skipped, threshold, price, context = plan.skipped, plan.threshold, plan.price, self.context
        prices = [np.inf if n in skipped else threshold + price * context(n) for n in requests]
        found = self.acceptance.drafted(requests, prices, said)
        return dict(zip(requests, fill_rows(found, prices), strict=True))

    def _weigh(self, requests: Names) -> tuple[Plan, Plan]:
        """What is expected of no draft, and of the best of those for all requests or some."""
        num_reqs, profile, block = len(requests), self.profile, self.block_size
        context = np.array([*map(self.context, requests)], dtype=float)
        total, drafter = float(context.sum()), profile.draft_seconds
        pace, slower = self.cost.scales(num_reqs)
        plain = pace * profile.parts(Work(num_reqs, num_reqs, 0, int(total), int(total)))[0]
        none = Plan(0, seconds=plain, rate=num_reqs / plain)
        rate = max(none.rate, self.best.rate if self.best and self.num_reqs == num_reqs else 0.0)
        # A token's worth is less what its row's attention takes.
        attend = rate * pace * profile.attend
        expected = self.acceptance.expected(requests)
        worth = expected - attend * context[:, None, None]

        def weigh(drafted: np.ndarray) -> Plan:
            """The likeliest tokens of these requests' drafts, as many as raise the rate."""
            each, values, read = 1 / expected.shape[1], worth[drafted].ravel(), context[drafted]
            order = (-values).argsort()
            values = values[order]
            seen = np.repeat(read, expected[0].size)[order].cumsum()
            counts = num_reqs + each * np.arange(1, len(values) + 1)
            seconds = pace * profile.target_seconds(counts, total, total + each * seen)
            seconds += slower * drafter(block * len(drafted), block * read.sum())
            rates = (num_reqs + each * (values.cumsum() + attend * seen)) / seconds
            # Of equal ones all are in or out.
            rates[:-1][values[:-1] <= values[1:]] = 0.0
            best = int(rates.argmax())
            rest = values[best + 1] if best + 1 < len(values) else min(values[best], 0.0) - 1
            skipped = frozenset(requests).difference(requests[i] for i in drafted)
            found = float(values[best] + rest) / 2, attend, skipped, "best", float(seconds[best])
            return Plan(self.max_draft, *found, float(rates[best]))

        draft = weigh(np.arange(num_reqs))
        if self.skips and num_reqs > 1:
            # Those whose drafts bring more than their blocks cost the drafter.
            gains = np.maximum(worth - max(draft.threshold, 0.0), 0.0).sum(2).mean(1)
            more = drafter(block * num_reqs, block * context) - drafter(block * (num_reqs - 1), 0.0)
            (gaining,) = (gains > max(rate, draft.rate) * slower * more).nonzero()
            if 0 < len(gaining) < num_reqs:
                draft = max(draft, weigh(gaining), key=lambda plan: plan.rate)
        return none, draft

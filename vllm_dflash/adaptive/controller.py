"""Whether to draft in a step, for which requests, and how many of each one's draft tokens to
verify: as many as commit the most tokens a second. Pure.

A block is drafted whole or not at all, for a shorter one costs little less and drafts worse.
Verifying commits one token a request, and each draft token with the probability that it and all
before it are accepted (``Acceptance``); what a step takes, ``StepCost`` knows. A token is verified
if it brings more than its row at its request's context takes, at the rate of the whole.

What does not look best is tried now and then, for two steps. What a trial has lost decides when the
next comes: so late that it was ``Tuning.exploration`` of the time, and never later than after 4
``block_size`` / ``exploration`` steps with about as many requests, whatever was measured.

    pytest tests/unit/test_adaptive.py
"""

import math
from collections.abc import Callable, Collection, Container, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences, Outcomes
from vllm_dflash.adaptive.cost import StepCost, power
from vllm_dflash.adaptive.tuning import TUNING, Tuning
from vllm_dflash.cost_profile import GUESS, Profile, Work


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and which of it to verify in the next."""

    num_draft_tokens: int
    """K of the step: all, or 0 for no drafter forward."""
    threshold: float = 0.0
    """A draft token is worth verifying if it is accepted with a probability above ..."""
    price: float = 0.0
    """... and this much more for each position of its request's context."""
    skipped: frozenset[Hashable] = frozenset()
    """The kinds of requests that have nothing to gain (``Controller.kind``)."""
    why: str = "best"
    """``best`` by what is known, or ``trial`` of what does not look best."""
    seconds: float = 1.0
    """Expected of a step."""
    rate: float = 0.0
    """Expected committed tokens a second."""


@dataclass(frozen=True)
class Status:
    """What the controller makes of drafting, for people."""

    drafting: bool
    why: str
    """``first``: nothing was chosen yet; ``pays``; ``slow``: would not pay if every draft token was
    accepted; ``rejected``: too few are."""
    measured: float | None = None
    """When a step that drafts was last measured at this batch size, on ``time.monotonic``'s
    clock."""
    next_trial: float | None = None
    """Where nothing is drafted: seconds of decoding until drafting is tried again, if all goes on
    as now."""


@dataclass(frozen=True)
class _Part:
    """Requests of one kind in a batch: how many, their mean context, and their drafts as they are
    to be expected, float64 [n, K]."""

    count: int
    context: float
    survival: np.ndarray

    def surplus(self, threshold: float, attend: float) -> float:
        """What the tokens that are verified bring a request over their price."""
        over = self.survival - attend * self.context - max(threshold, 0.0)
        return float(np.maximum(over, 0.0).sum(1).mean())


@dataclass
class _Size:
    """What is kept for about as many requests: steps, trials, the step of the last one, and how
    many steps it has lost."""

    steps: int = 0
    trials: int = 0
    tried: int = 0
    lost: float = 0.0


class Controller:
    """Learns from steps and plans the next. A draft has ``max_draft`` tokens, the drafter's block
    ``block_size`` rows."""

    def __init__(
        self,
        max_draft: int,
        block_size: int,
        group: Callable[[str], Hashable] = lambda _: None,
        limit: Callable[[str], int] | None = None,
        context: Callable[[str], int] = lambda _: 0,
        profile: Profile = GUESS,
        tuning: Tuning = TUNING,
        skips: bool = True,
    ) -> None:
        """``group``, ``limit``: see ``Acceptance``; ``context``: positions of a request's;
        ``profile``: of steps as they were measured at warm-up; ``skips``: whether requests that
        have nothing to gain cost no rows of the drafter's."""
        self.max_draft, self.block_size, self._tuning = max_draft, block_size, tuning
        self._context, self._profile, self._skips = context, profile, skips
        self.cost = StepCost(profile, tuning)
        self.acceptance = Acceptance(max_draft, tuning, group, limit)
        self._seen: list[tuple[Outcomes, Confidences | None]] = []
        self._steps, self._due = 0, 0
        """Steps planned, and when the next choice is."""
        self._best: Plan | None = None
        self._num_reqs = 0
        """For which it was chosen."""
        self._is_slow = False
        """Whether drafting would not pay if every draft token was accepted."""
        self._sizes: dict[int, _Size] = {}
        self._now = _Size()
        self._rest: list[Plan] = []
        """What is left of a trial."""
        self._usual_loss = 0.0
        """Of a step of the last trial, as it was expected."""

    def observe(
        self,
        work: Work | None,
        seconds: float,
        outcomes: Outcomes,
        confidences: Confidences | None = None,
        plan: Plan | None = None,
        writes_backlog: bool = False,
    ) -> None:
        """Takes in a step, and learns from it by the next choice. Nobody may change what is handed
        in until then.

        Args:
            work: what the step computed; None where its time tells nothing, as with a prompt in it.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
            confidences: of those draft tokens, where known.
            plan: that the step was scheduled with.
            writes_backlog: whether it is the first that drafts after some that did not, and writes
                the context of them all.
        """
        if outcomes:
            self._seen.append((outcomes, confidences))
            if not self.acceptance.young.isdisjoint(outcomes):
                self._learn()
        best, now = self._best, self._now
        if plan is not None and plan.why == "trial" and best is not None:
            lost = self._usual_loss
            if work is not None:
                tokens = work.num_reqs + sum(accepted for _, accepted in outcomes.values())
                lost = (seconds - tokens / best.rate) / best.seconds
            # Never more than its rows would take as plain steps of their own.
            now.lost += min(lost, 2.0 * self.block_size)
            now.lost = min(now.lost, 4.0 * self.block_size)
        # One that verifies and does not draft is between two plans.
        if work and not writes_backlog and (work.draft_rows or work.num_tokens == work.num_reqs):
            self.cost.observe(work, seconds)

    def plan(self, requests: Sequence[str]) -> Plan:
        """What to draft for these requests, which all decode."""
        kept_plan = self.kept_plan(len(requests))
        if kept_plan is not None:
            return kept_plan
        self._steps += 1
        self._now.steps += 1
        if self._rest:
            return self._rest.pop()
        self._learn()
        self._now = now = self._size(len(requests))
        none, draft = self._weigh(requests)
        was_off = self._best is not None and not self._best.num_draft_tokens
        margin = self._tuning.margin if was_off else 1.0
        best, other = (draft, none) if draft.rate > margin * none.rate else (none, draft)
        self._best, self._num_reqs = best, len(requests)
        self._due = self._steps + min(self._tuning.every, self._steps)
        if now.steps < self._next_trial():
            return best
        now.tried, now.lost, now.trials = now.steps, 0.0, now.trials + 1
        self._usual_loss = max(other.seconds * (1 - other.rate / best.rate) / best.seconds, 0.0)
        # Now and then whole drafts, so that positions that did not pay are seen to pay again.
        whole = Plan(self.max_draft, -1.0, why="trial")
        tried = replace(other, why="trial") if now.trials % 4 else whole
        # The first that drafts brings contexts up to date, only the second is like those that would
        # follow; the last verifies what the second drafted.
        self._rest = [replace(best, why="trial"), tried]
        return tried

    def kept_plan(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen
        yet; else None, and ``plan`` is to be asked."""
        is_due = self._rest or self._steps >= self._due
        if is_due or abs(num_reqs - self._num_reqs) * 8 > self._num_reqs:
            return None
        self._steps += 1
        self._now.steps += 1
        return self._best

    def kind(self, request: str) -> Hashable:
        """Requests that are accepted alike, at about as long a context; those of less than 512
        positions are all short."""
        return self.acceptance.group_of(request), (self._context(request) >> 9).bit_length()

    def lengths(
        self, requests: Sequence[str], plan: Plan, confidences: Confidences | None = None
    ) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are
        drafted."""
        if not plan.num_draft_tokens or not requests:
            return dict.fromkeys(requests, 0)
        prices = [plan.threshold] * len(requests)
        if plan.price:
            prices = [plan.threshold + plan.price * self._context(name) for name in requests]
        if plan.skipped:
            for i, name in enumerate(requests):
                if self.kind(name) in plan.skipped:
                    prices[i] = math.inf
        found = self.acceptance.lengths(requests, prices, confidences)
        return dict(zip(requests, found, strict=True))

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        self._learn()
        self.acceptance.forget(requests)

    def status(self) -> Status:
        """What was chosen last, and why."""
        best = self._best
        if best is None:
            return Status(drafting=True, why="first")
        measured = self.cost.measured.get((power(self._num_reqs), True))
        if best.num_draft_tokens:
            return Status(drafting=True, why="pays", measured=measured)
        steps = max(self._next_trial() - self._now.steps, self._due - self._steps, 0)
        why = "slow" if self._is_slow else "rejected"
        return Status(False, why, measured, steps * best.seconds)

    def _size(self, num_reqs: int) -> _Size:
        return self._sizes.setdefault(power(num_reqs), _Size())

    def _next_trial(self) -> int:
        """Its step, of those with about as many requests."""
        later = math.ceil(self._now.lost / self._tuning.exploration)
        return self._now.tried + max(2 * self._tuning.every, later)

    def _learn(self) -> None:
        if self._seen and self.acceptance.learn(self._seen):
            self._due = 0
        self._seen = []

    def _weigh(self, requests: Sequence[str]) -> tuple[Plan, Plan]:
        """What is expected of no draft, and of the best of those for all requests or some."""
        num_reqs, block, profile = len(requests), self.block_size, self._profile
        kinds: dict[Hashable, list[str]] = {}
        for request in requests:
            kinds.setdefault(self.kind(request), []).append(request)
        parts = {
            kind: _Part(
                len(names),
                sum(map(self._context, names)) / len(names),
                self.acceptance.expected(names),
            )
            for kind, names in kinds.items()
        }
        num_context = sum(part.count * part.context for part in parts.values())
        plain = self.cost.seconds(
            Work(num_reqs, num_reqs, 0, round(num_context), round(num_context))
        )
        none = Plan(0, seconds=plain, rate=num_reqs / plain)
        factor, whole = self.cost.factor(num_reqs, True), num_reqs * (self.max_draft + 1)
        self._is_slow = whole < none.rate * factor * profile.seconds(whole, num_reqs * block)
        rate = none.rate
        if self._best is not None and power(self._num_reqs) == power(num_reqs):
            rate = max(rate, self._best.rate)
        attend = rate * factor * profile.attend

        def weigh(kinds: Collection[Hashable]) -> Plan:
            """Drafts for these: the likeliest tokens, each less what its context costs, as long as
            the step's rate rises."""
            taken = [parts[kind] for kind in kinds]
            drafted = taken if self._skips else parts.values()
            sizes = [part.survival.size for part in taken]
            survival = np.concatenate([part.survival.ravel() for part in taken])
            each = np.repeat([part.count / len(part.survival) for part in taken], sizes)
            context = np.repeat([part.context for part in taken], sizes)
            worth = survival - attend * context
            order = np.argsort(-worth, kind="stable")
            worth, each = worth[order], each[order]
            seconds = factor * profile.seconds(
                num_reqs + np.cumsum(each),
                block * sum(part.count for part in drafted),
                num_context,
                num_context + np.cumsum(each * context[order]),
                block * sum(part.count * part.context for part in drafted),
            )
            rates = (num_reqs + np.cumsum(each * survival[order])) / seconds
            # Of equal ones all are in or out.
            best = int(np.argmax(np.where(np.append(worth[:-1] > worth[1:], True), rates, 0.0)))
            rest = worth[best + 1] if best + 1 < len(worth) else min(worth[best], 0.0) - 1
            return Plan(
                self.max_draft,
                float(worth[best] + rest) / 2,
                attend,
                frozenset(parts.keys() - set(kinds)),
                seconds=float(seconds[best]),
                rate=float(rates[best]),
            )

        draft = weigh(parts.keys())
        if len(parts) > 1 and self._skips:
            # Those whose drafts bring more than their blocks and contexts cost the drafter.
            price = max(rate, draft.rate) * factor
            rows = block * num_reqs
            gaining = [
                kind
                for kind, part in parts.items()
                if part.surplus(draft.threshold, attend)
                > price * block * part.context * profile.draft_attend
                + price * profile.draft_seconds(rows - block * part.count, rows) / part.count
            ]
            if 0 < len(gaining) < len(parts):
                draft = max(draft, weigh(gaining), key=lambda plan: plan.rate)
        return none, draft

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
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences, Outcomes
from vllm_dflash.adaptive.cost import StepCost, power
from vllm_dflash.adaptive.tuning import TUNING, Tuning
from vllm_dflash.cost_profile import GUESS, Profile, Work

_TRIAL = 2
"""Steps of a trial: the first that drafts brings the contexts up to date, only the second is like
those that would follow."""


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


@dataclass(frozen=True)
class Choice:
    """The plan of the next steps, for so many requests, with the committed tokens a second that are
    expected of it."""

    plan: Plan
    num_reqs: int
    rate: float
    seconds: float


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


@dataclass
class _Size:
    """What is kept for about as many requests."""

    steps: int = 0
    tried: int = 0
    """Step of the last trial."""
    lost: float = 0.0
    """Steps that it has lost."""
    trials: int = 0


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
    ) -> None:
        """``group``, ``limit``: see ``Acceptance``; ``context``: positions of a request's;
        ``profile``: of steps as they were measured at warm-up."""
        self.max_draft, self.block_size, self._tuning = max_draft, block_size, tuning
        self._context, self._profile = context, profile
        self.cost = StepCost(profile, tuning)
        self.acceptance = Acceptance(max_draft, tuning, group, limit)
        self._seen: list[tuple[Outcomes, Confidences | None]] = []
        self._steps, self._due = 0, 0
        """Steps planned, and when the next choice is."""
        self._sizes: dict[int, _Size] = {}
        self._now = _Size()
        """The one that was chosen for last."""
        self._rest: list[Plan] = []
        """What is left of a trial."""
        self._usual_loss = 0.0
        """Of a step of the last trial, as it was expected."""
        self._choice: Choice | None = None
        self._is_slow = False
        """Whether drafting would not pay if every draft token was accepted."""

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
        if plan is not None and plan.why == "trial":
            self._charge(work, seconds, outcomes)
        if (
            work is None
            or writes_backlog
            or (work.num_tokens > work.num_reqs > 0 == work.draft_rows)
        ):
            return  # the last kind verifies what was drafted before, and is between two plans
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
        self._now = self._size(len(requests))
        self._due = self._steps + min(self._tuning.every, self._steps)
        none, draft = self._weigh(requests)
        was_off = self._choice is not None and not self._choice.plan.num_draft_tokens
        margin = self._tuning.margin if was_off else 1.0
        best = self._choice = draft if draft.rate > margin * none.rate else none
        if self._now.steps >= self._next_trial():
            self._try(best, none if best is draft else draft)
        return self._rest.pop() if self._rest else best.plan

    def kept_plan(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen
        yet; else None, and ``plan`` is to be asked."""
        last = self._choice
        if (
            last is None
            or self._rest
            or self._steps >= self._due
            or abs(num_reqs - last.num_reqs) * 8 > last.num_reqs
        ):
            return None
        self._steps += 1
        self._now.steps += 1
        return last.plan

    def kind(self, request: str) -> Hashable:
        """Requests that are accepted alike, at about as long a context."""
        return self.acceptance.group_of(request), self._context(request).bit_length()

    def lengths(
        self, requests: Sequence[str], plan: Plan, confidences: Confidences | None = None
    ) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are
        drafted."""
        if not plan.num_draft_tokens or not requests:
            return dict.fromkeys(requests, 0)
        survival = self.acceptance.survival(requests, confidences)
        survival[:, plan.num_draft_tokens :] = 0.0
        prices: Any = plan.threshold
        if plan.price:
            contexts = np.fromiter(map(self._context, requests), float, len(requests))
            prices = (plan.threshold + plan.price * contexts)[:, None]
        if plan.skipped:
            survival[[self.kind(request) in plan.skipped for request in requests]] = 0.0
        return dict(zip(requests, self.acceptance.lengths(survival, prices), strict=True))

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        self._learn()
        self.acceptance.forget(requests)

    def status(self) -> Status:
        """What was chosen last, and why."""
        last = self._choice
        if last is None:
            return Status(drafting=True, why="first")
        measured = self.cost.measured.get((power(last.num_reqs), True))
        if last.plan.num_draft_tokens:
            return Status(drafting=True, why="pays", measured=measured)
        steps = max(self._next_trial() - self._now.steps, self._due - self._steps, 0)
        why = "slow" if self._is_slow else "rejected"
        return Status(False, why, measured, steps * last.seconds)

    def _size(self, num_reqs: int) -> _Size:
        return self._sizes.setdefault(power(num_reqs), _Size())

    def _learn(self) -> None:
        if self._seen and self.acceptance.learn(self._seen):
            self._due = 0
        self._seen = []

    def _weigh(self, requests: Sequence[str]) -> tuple[Choice, Choice]:
        """What is expected of no draft, and of the best of those for all requests or some."""
        num_reqs, profile = len(requests), self._profile
        kinds: dict[Hashable, list[str]] = {}
        for request in requests:
            kinds.setdefault(self.kind(request), []).append(request)
        parts = {
            kind: (
                len(names),
                sum(map(self._context, names)) / len(names),
                self.acceptance.expected(names),
            )
            for kind, names in kinds.items()
        }
        num_context = round(sum(count * context for count, context, _ in parts.values()))
        factor = self.cost.factor(num_reqs, True)
        plain = self.cost.seconds(Work(num_reqs, num_reqs, 0, num_context, num_context))
        none = Choice(Plan(0), num_reqs, num_reqs / plain, plain)
        last = self._choice
        alike = last is not None and power(last.num_reqs) == power(num_reqs)
        rate = max(none.rate, last.rate if last is not None and alike else 0.0)
        rows, k = num_reqs * self.block_size, self.max_draft
        at_most = factor * profile.seconds(num_reqs * (k + 1), rows)
        self._is_slow = num_reqs * (k + 1) < none.rate * at_most

        def weigh(taken: Sequence[Hashable]) -> Choice:
            found = [parts[kind] for kind in taken]
            price = rate * factor * profile.attend
            each, context, survival = (
                np.concatenate(column)
                for column in zip(
                    *(
                        (np.full(s.size, count / len(s)), np.full(s.size, context), s.ravel())
                        for count, context, s in found
                    ),
                    strict=True,
                )
            )
            worth = survival - price * context
            order = np.argsort(-worth, kind="stable")
            worth, each, context = worth[order], each[order], context[order]
            seconds = factor * profile.seconds(
                num_reqs + np.cumsum(each),
                self.block_size * sum(count for count, _, _ in found),
                num_context,
                num_context + np.cumsum(each * context),
                self.block_size * sum(count * context for count, context, _ in found),
            )
            tokens = num_reqs + np.cumsum(each * survival[order])
            # Of equal ones all are in or out.
            ends = np.append(worth[:-1] > worth[1:], True)
            best = int(np.argmax(np.where(ends, tokens / seconds, 0.0)))
            rest = worth[best + 1] if best + 1 < len(worth) else min(worth[best], 0.0) - 1
            plan = Plan(
                k, float(worth[best] + rest) / 2, price, frozenset(parts.keys() - set(taken))
            )
            return Choice(plan, num_reqs, float(tokens[best] / seconds[best]), float(seconds[best]))

        # Those first that bring most for what their context costs the drafter.
        def gain(kind: Hashable) -> float:
            _, context, survival = parts[kind]
            cost = rate * factor * context
            kept = np.maximum(survival - cost * profile.attend, 0.0).sum(1).mean()
            return float(kept - cost * profile.draft_attend * self.block_size)

        first = sorted(parts, key=gain, reverse=True)
        return none, max(
            (weigh(first[: i + 1]) for i in range(len(first))), key=lambda choice: choice.rate
        )

    def _next_trial(self) -> int:
        """Its step, of those with about as many requests."""
        now, least = self._now, 2 * self._tuning.every
        return now.tried + max(least, math.ceil(now.lost / self._tuning.exploration))

    def _try(self, best: Choice, other: Choice) -> None:
        """Plans a trial: no draft where drafts are, else a draft; now and then one that is verified
        whole, so that positions that did not pay are seen to pay again."""
        now, plan = self._now, other.plan
        now.tried, now.lost, now.trials = now.steps, 0.0, now.trials + 1
        if now.trials % 4 == 0:
            plan = Plan(self.max_draft, -1.0)
        loss = other.seconds * (1 - other.rate / best.rate) / best.seconds
        self._usual_loss = max(loss, 0.0)
        self._rest = [replace(each, why="trial") for each in (best.plan, *[plan] * _TRIAL)]

    def _charge(self, work: Work | None, seconds: float, outcomes: Outcomes) -> None:
        """What a step of a trial has lost, in steps that look best. It is never more than its rows
        would take as plain steps of their own."""
        last, now = self._choice, self._now
        if last is None:
            return
        if work is None:
            now.lost += self._usual_loss
        else:
            tokens = work.num_reqs + sum(accepted for _, accepted in outcomes.values())
            now.lost += (seconds - tokens / last.rate) / last.seconds
        now.lost = min(now.lost, 2.0 * _TRIAL * self.block_size)

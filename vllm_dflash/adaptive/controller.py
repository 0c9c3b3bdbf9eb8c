"""Whether to draft in a step, and how many of each request's draft tokens to verify: as many as commit the most tokens a second. Pure.

A block is drafted whole or not at all, for a shorter one costs little less and drafts worse. Verifying some of its tokens commits one
token a request, and each draft token with the probability that it and all before it are accepted; ``StepCost`` knows the seconds,
``Acceptance`` the probabilities. Now and then what does not look best is tried, to learn what it costs and brings; what that is
expected to lose is paid from a budget, a share of the time that has passed.

    pytest tests/unit/test_adaptive.py
"""

import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences
from vllm_dflash.adaptive.cost import LocalCost, StepCost, Work

EXPLORATION = 0.0075
"""Share of the observed time that may be lost to trying what does not look best."""
_FIRST_TRIES = 4
"""Steps that each of a whole block and no draft gets at once, for a batch size that was not seen."""
_EVERY = 16
"""Steps between two choices, unless the number of requests changes by more than an eighth, or drafts tell much that is new."""
_LONGEST_EVERY = 32
"""The same where it was chosen again and again to draft nothing: the interval doubles up to here."""
_LEARN_EVERY = 8
"""Steps that are learned from together: Python is several times as slow where between two of its turns a model ran, which took its caches."""
_TRIAL_DRAFTS = 8
"""Most steps of a trial of drafting: where that is about as good as none, more is learned at no cost."""
_YOUNG = 64
"""Steps after which two are learned from together, and so on."""
_SWITCH = 1.01
"""The other choice has to be better by this factor, so that noise does not make it jump."""
_SAFE = 1.02
"""Drafting has to promise so much more than no drafting, which is sure of what it brings: never slower than no speculation."""


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and which of it to verify in the next."""

    num_draft_tokens: int
    """K of the step: all, or 0 for no drafter forward."""
    threshold: float = 0.0
    """A draft token is worth verifying if it is accepted with a probability above."""
    why: str = "best"
    """``best`` by what is known, ``first`` steps of a batch size, or ``trial`` of what does not look best."""


@dataclass(frozen=True)
class _Choice:
    """The plan of the next steps, for so many requests, with the committed tokens a second that are expected of it."""

    plan: Plan
    num_reqs: int
    rate: float


class Controller:
    """Learns from steps and plans the next. A draft has ``max_draft`` tokens, the drafter's block ``block_size`` rows."""

    def __init__(self, max_draft: int, block_size: int, group: Callable[[str], Hashable] = lambda _: None) -> None:
        """``group``: see ``Acceptance``."""
        self.max_draft, self.block_size = max_draft, block_size
        self.cost, self.acceptance = StepCost(), Acceptance(max_draft, group)
        self._budget, self._steps, self._chosen_at, self._every = 0.0, 0, 0, _EVERY
        self._tries: dict[int, list[int]] = {}
        """What is left of the first steps, by power of two of the requests: a number of requests may pass before all are done."""
        self._rest: list[Plan] = []
        """What is left of a trial."""
        self._num_trials = self._trial_at = 0
        self._choice: _Choice | None = None
        self._cost: LocalCost | None = None
        """By which the last choice was made."""
        self._seen: list[tuple[Work | None, float, Mapping[str, tuple[int, int]], Confidences | None, int, bool]] = []
        """Steps that are to be learned from."""

    def observe(
        self, work: Work | None, seconds: float, outcomes: Mapping[str, tuple[int, int]], confidences: Confidences | None = None,
        stands_for: int = 1, catches_up: bool = False,
    ) -> None:  # fmt: skip
        """Takes in a step, and learns from it by the next choice, or a few steps later. Nobody may change what is handed in until then.

        Args:
            work: what the step computed; None where its time tells nothing, as with a prompt in it.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
            confidences: of those draft tokens, where known.
            stands_for: how many such steps there were for each that is taken in.
            catches_up: whether it is the first that drafts after some that did not, and writes the context of them all.
        """
        self._seen.append((work, seconds, outcomes, confidences, stands_for, catches_up))
        # The first ones say the most.
        if len(self._seen) >= min(1 + self._steps // _YOUNG, _LEARN_EVERY) or any(map(self.acceptance.is_new, outcomes)):
            self._learn()

    def plan(self, requests: Sequence[str], num_context: int = 0) -> Plan:
        """What to draft for these requests, which all decode; ``num_context``: positions of their contexts, in all."""
        standing = self.standing(len(requests))
        if standing is not None:
            return standing
        self._steps += 1
        return self._plan(requests, num_context)

    def standing(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen yet; else None, and ``plan`` is to be asked."""
        last = self._choice
        is_due = self._steps + 1 - self._chosen_at >= self._every or self.acceptance.has_news
        if last is None or is_due or self._rest or abs(num_reqs - last.num_reqs) * 8 > last.num_reqs:
            return None
        self._steps += 1
        return last.plan

    def lengths(self, requests: Sequence[str], plan: Plan, confidences: Confidences | None = None) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are drafted."""
        return self.acceptance.lengths(requests, plan.num_draft_tokens, plan.threshold, confidences)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        self._learn()
        self.acceptance.forget(requests)

    def _learn(self) -> None:
        for work, seconds, outcomes, confidences, stands_for, catches_up in self._seen:
            if work is not None and catches_up:
                # It tells nothing of steps that draft after others that did, and was not in what its trial was expected to lose.
                if self._cost is not None:
                    usual = self._cost.seconds(work)
                    self._budget -= min(seconds - usual, 10 * usual)
            elif work is not None:
                # A step that was held up, by another process for instance, buys no trials.
                usual = self.cost.observe(work, seconds)
                self._budget = min(self._budget + stands_for * EXPLORATION * usual, 10 * usual)
            for request, (verified, accepted) in outcomes.items():
                if verified:
                    self.acceptance.observe(request, verified, accepted, None if confidences is None else confidences.get(request))
        self._seen.clear()

    def _plan(self, requests: Sequence[str], num_context: int) -> Plan:
        if self._rest:
            return self._rest.pop()
        self._learn()
        last = self._choice
        tries = self._tries.setdefault(round(math.log2(len(requests))), [])
        if not tries and not self.cost.has_seen(len(requests)):
            tries += [self.max_draft] * _FIRST_TRIES + [0] * _FIRST_TRIES
        if tries:
            self._choice = None
            return Plan(tries.pop(0), why="first")
        self._chosen_at, self.acceptance.has_news = self._steps, False
        cost, survival = self.cost.near(len(requests)), self.acceptance.expected(requests)
        self._cost = cost
        choices = {k: self._weigh(cost, survival, len(requests), num_context, k) for k in (0, self.max_draft)}
        none, draft = choices[0], choices[self.max_draft]
        factor = _SAFE * (1.0 if last is None else _SWITCH if last.plan.num_draft_tokens == 0 else 1 / _SWITCH)
        best = draft if draft.rate > factor * none.rate else none
        is_off_again = last is not None and last.plan.num_draft_tokens == best.plan.num_draft_tokens == 0
        self._choice, self._every = best, min(2 * self._every, _LONGEST_EVERY) if is_off_again else _EVERY
        return self._trial(cost, survival, num_context, best, draft.plan) or best.plan

    def _trial(self, cost: LocalCost, survival: np.ndarray, num_context: int, best: _Choice, draft: Plan) -> Plan | None:
        """What does not look best, if it was not tried for long and the budget pays for it.

        Where nothing is drafted, ``draft``, what would be best of those that draft: the nearer it is to paying, the more of it; and one
        time in four drafts that are verified whole, so that positions that did not pay are seen to pay again. Where drafts are, in turn
        none, and a token a request less than the choice verifies, as the cost need not be a line.
        """
        num_reqs, k = best.num_reqs, best.plan.num_draft_tokens
        self._num_trials += 1
        plan = Plan(0, why="trial")
        if not k:
            is_part = self._num_trials % 4 and bool((survival > draft.threshold).any())
            plan = Plan(self.max_draft, draft.threshold if is_part else 0.0, why="trial")
        elif self._num_trials % 2:
            kept = np.sort(survival[survival > best.plan.threshold])
            if len(kept) > len(survival):
                plan = Plan(k, float(kept[len(survival) - 1]), why="trial")
        if self._steps - self._trial_at < 2 * _EVERY:
            return None
        likely = survival[:, : plan.num_draft_tokens]
        kept = likely[likely > plan.threshold]
        share = num_reqs / len(survival)
        seconds = cost.seconds(self._work(num_reqs, round(len(kept) * share), plan.num_draft_tokens, num_context))
        loss = max(seconds - (num_reqs + float(kept.sum()) * share) / best.rate, 0.0)
        # The first step without a draft still verifies what was drafted before, and the first with one brings the context up to date:
        # only the second is like those that would follow.
        steps = 1 if k and plan.num_draft_tokens else 2
        if steps * loss > self._budget:
            return None
        if not k:
            steps = max(steps, min(_TRIAL_DRAFTS, int(self._budget / max(loss, 1e-9))))
        self._budget, self._trial_at = self._budget - steps * loss, self._steps
        self._rest = [plan] * (steps - 1)
        return plan

    def _work(self, num_reqs: int, num_verified: int, num_draft_tokens: int, num_context: int) -> Work:
        """A step of so many requests that verifies so many draft tokens in all."""
        return Work(num_reqs, num_reqs + num_verified, num_reqs * self.block_size if num_draft_tokens else 0, num_context)

    def _weigh(self, cost: LocalCost, survival: np.ndarray, num_reqs: int, num_context: int, k: int) -> _Choice:
        """Steps that draft ``k`` tokens a request and verify the likeliest of them, as many as commit the most tokens a second.

        ``survival`` falls along a row, so the tokens above a threshold are each request's first ones. Half a token more a request
        at a time, for the cost need not be a line: a GPU has a number of rows from which on each costs.
        """
        likeliest, share = np.sort(survival[:, :k], axis=None)[::-1], num_reqs / len(survival)
        gained, best = [0.0, *likeliest.cumsum().tolist()], None
        thresholds = np.append(likeliest, 0.0)[[min(round(half / 2 * len(survival)), len(likeliest)) for half in range(2 * k + 1)]].tolist()
        counts = np.searchsorted(-likeliest, [-threshold for threshold in thresholds]).tolist()  # of equal ones all stay out
        for threshold, count in zip(thresholds, counts, strict=True):
            seconds = cost.seconds(self._work(num_reqs, round(count * share), k, num_context))
            rate = (num_reqs + gained[count] * share) / seconds
            if best is None or rate > best.rate:
                best = _Choice(Plan(k, threshold), num_reqs, rate)
        assert best is not None
        return best

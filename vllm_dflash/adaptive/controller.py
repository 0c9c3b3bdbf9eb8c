"""Whether to draft in a step, and how many of each request's draft tokens to verify: as many as
commit the most tokens a second. Pure.

A block is drafted whole or not at all, for a shorter one costs little less and drafts worse.
Verifying some of its tokens commits one token a request, and each draft token with the probability
that it and all before it are accepted; ``StepCost`` knows the seconds, ``Acceptance`` the
probabilities. Now and then what does not look best is tried, to learn what it costs and brings;
what that is expected to lose is paid from a budget, a share of the time that has passed.

What was measured wrong once must not stand for good. A trial that no budget would ever pay for is
made on credit after ``STALE`` steps, any other after ``_SAVED`` / ``EXPLORATION``, unless the
budget is overdrawn. What it loses is charged afterwards, by what it is then known to cost, and is
never more than its rows would cost as plain steps of their own. So a trial comes within ``_SAVED``
/ ``EXPLORATION`` + ``_LONGEST_EVERY`` steps where nothing is owed, else within as many and what is
owed over ``EXPLORATION``: for a trial of two steps at most 4 ``block_size`` / ``EXPLORATION`` plain
steps.

    pytest tests/unit/test_adaptive.py
"""

import math
import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences
from vllm_dflash.adaptive.cost import STALE, LocalCost, StepCost, Work

EXPLORATION = 0.0075
"""Share of the observed time that may be lost to trying what does not look best."""
_FIRST_TRIES = 4
"""Steps that each of a whole block and no draft gets at once, for a batch size that was not
seen."""
_EVERY = 16
"""Steps between two choices, unless the number of requests changes by more than an eighth, or
drafts tell much that is new."""
_LONGEST_EVERY = 32
"""The same where it was chosen again and again to draft nothing: the interval doubles up to
here."""
_LEARN_EVERY = 8
"""Steps that are learned from together: Python is several times as slow where between two of its
turns a model ran, which took its caches."""
_TRIAL_DRAFTS = 8
"""Most steps of a trial of drafting: where that is about as good as none, more is learned at no
cost."""
_YOUNG = 64
"""Steps after which two are learned from together, and so on."""
_SWITCH = 1.01
"""The other choice has to be better by this factor, so that noise does not make it jump."""
_SAFE = 1.02
"""Drafting has to promise so much more than no drafting, which is sure of what it brings: never
slower than no speculation."""
_SAVED = 10
"""Steps whose time the budget may grow to."""


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and which of it to verify in the next."""

    num_draft_tokens: int
    """K of the step: all, or 0 for no drafter forward."""
    threshold: float = 0.0
    """A draft token is worth verifying if it is accepted with a probability above."""
    why: str = "best"
    """``best`` by what is known, ``first`` steps of a batch size, or ``trial`` of what does not
    look best."""


@dataclass(frozen=True)
class _Choice:
    """The plan of the next steps, for so many requests, with the committed tokens a second that are
    expected of it."""

    plan: Plan
    num_reqs: int
    rate: float


@dataclass(frozen=True)
class Status:
    """What the controller makes of drafting, for people."""

    drafting: bool
    why: str
    """``first`` steps of a batch size; ``pays``; ``slow``: would not pay if every draft token was
    accepted; ``rejected``: too few are."""
    measured: float | None = None
    """When a step that drafts was last measured at this batch size, on ``time.monotonic``'s
    clock."""
    next_trial: float | None = None
    """Where nothing is drafted: seconds of decoding until drafting is tried again, if all goes on
    as now."""


class Controller:
    """Learns from steps and plans the next. A draft has ``max_draft`` tokens, the drafter's block
    ``block_size`` rows."""

    def __init__(
        self, max_draft: int, block_size: int, group: Callable[[str], Hashable] = lambda _: None
    ) -> None:
        """``group``: see ``Acceptance``."""
        self.max_draft, self.block_size = max_draft, block_size
        self.cost, self.acceptance = StepCost(), Acceptance(max_draft, group)
        self._budget, self._steps, self._chosen_at, self._every = 0.0, 0, 0, _EVERY
        self._tries: dict[int, list[int]] = {}
        """What is left of the first steps, by power of two of the requests: a number of requests
        may pass before all are done."""
        self._rest: list[Plan] = []
        """What is left of a trial."""
        self._num_trials = self._trial_at = 0
        self._tried: dict[tuple[int, str], int] = {}
        """When each kind of trial was last made, by power of two of the requests."""
        self._unsettled: tuple[Plan, int, int, float] | None = None
        """The last trial: its plan, requests, steps and the seconds that were paid for it."""
        self._needs, self._drafted_at = (0.0, 0), dict[int, float]()
        """Seconds that the next trial is expected to lose, and when it was last made; when a draft
        was last measured, by power of two."""
        self._choice: _Choice | None = None
        self._cost: LocalCost | None = None
        """By which the last choice was made."""
        self._seen: list[
            tuple[Work | None, float, Mapping[str, tuple[int, int]], Confidences | None, int, bool]
        ] = []
        """Steps that are to be learned from."""

    def observe(
        self,
        work: Work | None,
        seconds: float,
        outcomes: Mapping[str, tuple[int, int]],
        confidences: Confidences | None = None,
        stands_for: int = 1,
        writes_backlog: bool = False,
    ) -> None:
        """Takes in a step, and learns from it by the next choice, or a few steps later. Nobody may
        change what is handed in until then.

        Args:
            work: what the step computed; None where its time tells nothing, as with a prompt in it.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
            confidences: of those draft tokens, where known.
            stands_for: how many such steps there were for each that is taken in.
            writes_backlog: whether it is the first that drafts after some that did not, and writes
                the context of them all.
        """
        self._seen.append((work, seconds, outcomes, confidences, stands_for, writes_backlog))
        # The first ones say the most.
        if len(self._seen) >= min(1 + self._steps // _YOUNG, _LEARN_EVERY) or any(
            map(self.acceptance.is_new, outcomes)
        ):
            self._learn()

    def plan(self, requests: Sequence[str], num_context: int = 0) -> Plan:
        """What to draft for these requests, which all decode; ``num_context``: positions of their
        contexts, in all."""
        kept_plan = self.kept_plan(len(requests))
        if kept_plan is not None:
            return kept_plan
        self._steps += 1
        return self._plan(requests, num_context)

    def kept_plan(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen
        yet; else None, and ``plan`` is to be asked."""
        last = self._choice
        is_due = self._steps + 1 - self._chosen_at >= self._every or self.acceptance.has_news
        if (
            last is None
            or is_due
            or self._rest
            or abs(num_reqs - last.num_reqs) * 8 > last.num_reqs
        ):
            return None
        self._steps += 1
        return last.plan

    def lengths(
        self, requests: Sequence[str], plan: Plan, confidences: Confidences | None = None
    ) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are
        drafted."""
        return self.acceptance.lengths(requests, plan.num_draft_tokens, plan.threshold, confidences)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        self._learn()
        self.acceptance.forget(requests)

    def _learn(self) -> None:
        for work, seconds, outcomes, confidences, stands_for, writes_backlog in self._seen:
            if work is not None and writes_backlog:
                # It tells nothing of steps that draft after others that did, and was not in what
                # its trial was expected to lose.
                if self._cost is not None:
                    usual = self._credible(self._cost, work)
                    self._budget -= min(seconds - usual, _SAVED * usual)
            elif work is not None:
                # A step that was held up, by another process for instance, buys no trials.
                usual = self.cost.observe(work, seconds)
                self._budget = min(self._budget + stands_for * EXPLORATION * usual, _SAVED * usual)
                if work.draft_rows:
                    self._drafted_at[_power(work.num_reqs)] = time.monotonic()
            for request, (verified, accepted) in outcomes.items():
                if verified:
                    self.acceptance.observe(
                        request,
                        verified,
                        accepted,
                        None if confidences is None else confidences.get(request),
                    )
        self._seen.clear()

    def _plan(self, requests: Sequence[str], num_context: int) -> Plan:
        if self._rest:
            return self._rest.pop()
        self._learn()
        last = self._choice
        tries = self._tries.setdefault(_power(len(requests)), [])
        if not tries and not self.cost.has_seen(len(requests)):
            tries += [self.max_draft] * _FIRST_TRIES + [0] * _FIRST_TRIES
        if tries:
            self._choice = None
            return Plan(tries.pop(0), why="first")
        self._chosen_at, self.acceptance.has_news = self._steps, False
        cost, survival = self.cost.near(len(requests)), self.acceptance.expected(requests)
        self._cost = cost
        choices = {
            k: self._weigh(cost, survival, len(requests), num_context, k)
            for k in (0, self.max_draft)
        }
        none, draft = choices[0], choices[self.max_draft]
        factor = _SAFE * (
            1.0 if last is None else _SWITCH if last.plan.num_draft_tokens == 0 else 1 / _SWITCH
        )
        best = draft if draft.rate > factor * none.rate else none
        is_off_again = (
            last is not None and last.plan.num_draft_tokens == best.plan.num_draft_tokens == 0
        )
        self._choice, self._every = (
            best,
            (min(2 * self._every, _LONGEST_EVERY) if is_off_again else _EVERY),
        )
        return self._trial(cost, survival, num_context, best, draft.plan) or best.plan

    def _trial(
        self, cost: LocalCost, survival: np.ndarray, num_context: int, best: _Choice, draft: Plan
    ) -> Plan | None:
        """What does not look best, if it was not tried for long and the budget pays for it, or
        gives credit."""
        self._num_trials += 1
        is_early = self._steps - self._trial_at < 2 * _EVERY
        if not is_early:
            self._charge(cost, survival, num_context, best)
        candidates = {
            (_power(best.num_reqs), kind): plan
            for kind, plan in self._candidates(survival, best.plan, draft).items()
        }
        turn = (
            "less"
            if self._num_trials % 2 and any(kind == "less" for _, kind in candidates)
            else "none"
        )
        most = (
            _SAVED * self._expected(survival, best.num_reqs, num_context, best.plan)[1] / best.rate
        )
        # What waited longest comes first; out of its turn only on credit.
        for at in sorted(candidates, key=lambda at: self._tried.setdefault(at, self._steps)):
            plan, tried = candidates[at], self._tried[at]
            loss = self._loss(cost, survival, num_context, best, plan)
            # The first step without a draft still verifies what was drafted before, and the first
            # with one brings the context up to date: only the second is like those that would
            # follow.
            steps = 1 if best.plan.num_draft_tokens and plan.num_draft_tokens else 2
            self._needs = steps * loss, tried
            # What can be saved up for is left to that, for as long as it may take.
            patience = STALE if steps * loss > most else _SAVED / EXPLORATION
            is_credited = self._budget >= 0 and self._steps - tried >= patience
            is_paid = (
                at[1] in (turn, "part") + ("whole",) * (not best.plan.num_draft_tokens)
                and steps * loss <= self._budget
            )
            if is_early or not (is_paid or is_credited):
                continue
            if not best.plan.num_draft_tokens:
                steps = max(steps, min(_TRIAL_DRAFTS, int(self._budget / max(loss, 1e-9))))
            self._budget, self._trial_at, self._tried[at] = (
                self._budget - steps * loss,
                self._steps,
                self._steps,
            )
            self._unsettled = None if is_paid else (plan, best.num_reqs, steps, steps * loss)
            self._rest = [plan] * (steps - 1)
            return plan
        return None

    def _candidates(self, survival: np.ndarray, best: Plan, draft: Plan) -> dict[str, Plan]:
        """What may be tried next, by the name of its kind.

        Where nothing is drafted, ``draft``, what would be best of those that draft, and one time in
        four drafts that are verified whole, so that positions that did not pay are seen to pay
        again. Where drafts are, none; a token a request less than the choice verifies, as the cost
        need not be a line; and whole ones where the choice verifies only part.
        """
        if not best.num_draft_tokens:
            is_part = self._num_trials % 4 and bool((survival > draft.threshold).any())
            return {
                "part" if is_part else "whole": Plan(
                    self.max_draft, draft.threshold if is_part else 0.0, why="trial"
                )
            }
        found = {"none": Plan(0, why="trial")}
        kept = np.sort(survival[survival > best.threshold])
        if len(kept) > len(survival):
            found["less"] = Plan(best.num_draft_tokens, float(kept[len(survival) - 1]), why="trial")
        if len(kept) < survival.size:
            found["whole"] = Plan(best.num_draft_tokens, why="trial")
        return found

    def _loss(
        self, cost: LocalCost, survival: np.ndarray, num_context: int, best: _Choice, plan: Plan
    ) -> float:
        """Seconds that a step of ``plan`` is expected to lose against ``best``."""
        work, tokens = self._expected(survival, best.num_reqs, num_context, plan)
        best_work, best_tokens = self._expected(survival, best.num_reqs, num_context, best.plan)
        seconds = self._credible(cost, work)
        # What computes less in every way takes no longer, whatever was measured.
        if work.num_tokens <= best_work.num_tokens and work.draft_rows <= best_work.draft_rows:
            seconds = min(seconds, best_tokens / best.rate)
        return max(seconds - tokens / best.rate, 0.0)

    def _charge(
        self, cost: LocalCost, survival: np.ndarray, num_context: int, best: _Choice
    ) -> None:
        """Pays or gets back the difference between what the last trial was expected to lose and
        what it is now known to."""
        if self._unsettled is not None:
            plan, num_reqs, steps, paid = self._unsettled
            if _power(num_reqs) == _power(best.num_reqs):
                self._budget += paid - steps * self._loss(cost, survival, num_context, best, plan)
            self._unsettled = None

    def _credible(self, cost: LocalCost, work: Work) -> float:
        """Seconds of a step, at most those of as many plain steps as it has rows for each request:
        the drafter is no larger than the target."""
        plain = cost.seconds(Work(work.num_reqs, work.num_reqs, 0, work.num_context))
        return min(cost.seconds(work), plain * (work.num_tokens + work.draft_rows) / work.num_reqs)

    def _expected(
        self, survival: np.ndarray, num_reqs: int, num_context: int, plan: Plan
    ) -> tuple[Work, float]:
        """A step of a plan, and the tokens that it is expected to commit."""
        likely, share = survival[:, : plan.num_draft_tokens], num_reqs / len(survival)
        kept = likely[likely > plan.threshold]
        work = self._work(num_reqs, round(len(kept) * share), plan.num_draft_tokens, num_context)
        return work, num_reqs + float(kept.sum()) * share

    def status(self) -> Status:
        """What was chosen last, and why."""
        last, cost = self._choice, self._cost
        if last is None or cost is None:
            return Status(drafting=True, why="first")
        num_reqs, measured = last.num_reqs, self._drafted_at.get(_power(last.num_reqs))
        if last.plan.num_draft_tokens:
            return Status(drafting=True, why="pays", measured=measured)
        seconds = cost.seconds(self._work(num_reqs, num_reqs * self.max_draft, self.max_draft, 0))
        is_slow = num_reqs * (self.max_draft + 1) / seconds < last.rate
        return Status(
            False,
            "slow" if is_slow else "rejected",
            measured,
            self._until_trial(num_reqs / last.rate),
        )

    def _until_trial(self, step: float) -> float:
        """Seconds until drafting is tried, of steps that take ``step`` seconds."""
        loss, tried = self._needs
        saved = (loss - self._budget) / EXPLORATION if loss <= _SAVED * step else math.inf
        patience = STALE if loss > _SAVED * step else _SAVED / EXPLORATION
        credited = max((tried + patience - self._steps) * step, -self._budget / EXPLORATION)
        soonest = max(self._trial_at + 2 * _EVERY, self._chosen_at + self._every) - self._steps
        return max(soonest * step, min(saved, credited), 0.0)

    def _work(
        self, num_reqs: int, num_verified: int, num_draft_tokens: int, num_context: int
    ) -> Work:
        """A step of so many requests that verifies so many draft tokens in all."""
        return Work(
            num_reqs,
            num_reqs + num_verified,
            num_reqs * self.block_size if num_draft_tokens else 0,
            num_context,
        )

    def _weigh(
        self, cost: LocalCost, survival: np.ndarray, num_reqs: int, num_context: int, k: int
    ) -> _Choice:
        """Steps that draft ``k`` tokens a request and verify the likeliest of them, as many as
        commit the most tokens a second.

        ``survival`` falls along a row, so the tokens above a threshold are each request's first
        ones. Half a token more a request
        at a time, for the cost need not be a line: a GPU has a number of rows from which on each
        costs.
        """
        likeliest, share = np.sort(survival[:, :k], axis=None)[::-1], num_reqs / len(survival)
        gained, best = [0.0, *likeliest.cumsum().tolist()], None
        thresholds = np.append(likeliest, 0.0)[
            [min(round(half / 2 * len(survival)), len(likeliest)) for half in range(2 * k + 1)]
        ].tolist()
        counts = np.searchsorted(
            -likeliest, [-threshold for threshold in thresholds]
        ).tolist()  # of equal ones all stay out
        for threshold, count in zip(thresholds, counts, strict=True):
            seconds = cost.seconds(self._work(num_reqs, round(count * share), k, num_context))
            rate = (num_reqs + gained[count] * share) / seconds
            if best is None or rate > best.rate:
                best = _Choice(Plan(k, threshold), num_reqs, rate)
        assert best is not None
        return best


def _power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm."""
    return round(math.log2(num_reqs))

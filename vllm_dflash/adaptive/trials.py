"""Now and then what does not look best is tried, to learn what it costs and brings; what that is
expected to lose is paid from a budget, a share of the time that has passed. Pure.

What was measured wrong once must not stand for good. A trial that no budget would ever pay for is
made on credit after ``STALE`` steps, any other after ``_SAVED`` / ``EXPLORATION``, unless the
budget is overdrawn. What it loses is charged afterwards, by what it is then known to cost, and is
never more than its rows would cost as plain steps of their own. So a trial comes within ``_SAVED``
/ ``EXPLORATION`` and the longest time between two choices, in steps, where nothing is owed, else
within as many and what is owed over ``EXPLORATION``: for a trial of two steps at most
4 ``block_size`` / ``EXPLORATION`` plain steps.

    pytest tests/unit/test_adaptive_stale.py
"""

import math

import numpy as np

from vllm_dflash.adaptive.cost import STALE, power
from vllm_dflash.adaptive.plans import Choice, Outlook, Plan

EXPLORATION = 0.0075
"""Share of the observed time that may be lost to trying what does not look best."""
_TRIAL_DRAFTS = 8
"""Most steps of a trial of drafting: where that is about as good as none, more is learned at no
cost."""
_SAVED = 10
"""Steps whose time the budget may grow to."""


class Trials:
    """The budget, and what was tried when; ``apart``: fewest steps between two trials."""

    def __init__(self, apart: int) -> None:
        self._apart, self._budget = apart, 0.0
        self._count = self._last = 0
        self._tried: dict[tuple[int, str], int] = {}
        """When each kind of trial was last made, by power of two of the requests."""
        self._unsettled: tuple[Plan, int, int, float] | None = None
        """The last trial: its plan, requests, steps and the seconds that were paid for it."""
        self._needs = 0.0, 0
        """Seconds that the next trial is expected to lose, and when it was last made."""

    def earn(self, usual: float, num_steps: int) -> None:
        """So many steps have passed, which usually take ``usual`` seconds."""
        self._budget = min(self._budget + num_steps * EXPLORATION * usual, _SAVED * usual)

    def charge(self, seconds: float, usual: float) -> None:
        """A step was ``seconds`` long for what it caught up with, and would have been ``usual``."""
        self._budget -= min(seconds - usual, _SAVED * usual)

    def choose(self, step: int, outlook: Outlook, best: Choice, draft: Plan) -> list[Plan]:
        """Plans of the next steps: what does not look best, if it was not tried for long and the
        budget pays for it, or gives credit; empty where nothing is tried."""
        self._count += 1
        is_early = step - self._last < self._apart
        if not is_early:
            self._settle(outlook, best)
        candidates = {
            (power(best.num_reqs), kind): plan
            for kind, plan in self._candidates(outlook.survival, best.plan, draft).items()
        }
        turn = (
            "less" if self._count % 2 and any(kind == "less" for _, kind in candidates) else "none"
        )
        most = _SAVED * outlook.expected(best.plan)[1] / best.rate
        # What waited longest comes first; out of its turn only on credit.
        for at in sorted(candidates, key=lambda at: self._tried.setdefault(at, step)):
            plan, tried = candidates[at], self._tried[at]
            loss = outlook.loss(best, plan)
            # The first step without a draft still verifies what was drafted before, and the first
            # with one brings the context up to date: only the second is like those that would
            # follow.
            steps = 1 if best.plan.num_draft_tokens and plan.num_draft_tokens else 2
            self._needs = steps * loss, tried
            is_credited = self._budget >= 0 and step - tried >= _patience(steps * loss, most)
            is_paid = (
                at[1] in (turn, "part") + ("whole",) * (not best.plan.num_draft_tokens)
                and steps * loss <= self._budget
            )
            if is_early or not (is_paid or is_credited):
                continue
            if not best.plan.num_draft_tokens:
                steps = max(steps, min(_TRIAL_DRAFTS, int(self._budget / max(loss, 1e-9))))
            self._budget -= steps * loss
            self._last = self._tried[at] = step
            self._unsettled = None if is_paid else (plan, best.num_reqs, steps, steps * loss)
            return [plan] * steps
        return []

    def _candidates(self, survival: np.ndarray, best: Plan, draft: Plan) -> dict[str, Plan]:
        """What may be tried next, by the name of its kind.

        Where nothing is drafted, ``draft``, what would be best of those that draft, and one time in
        four drafts that are verified whole, so that positions that did not pay are seen to pay
        again. Where drafts are, none; a token a request less than the choice verifies, as the cost
        need not be a line; and whole ones where the choice verifies only part.
        """
        if not best.num_draft_tokens:
            is_part = self._count % 4 and bool((survival > draft.threshold).any())
            return {
                "part" if is_part else "whole": Plan(
                    draft.num_draft_tokens, draft.threshold if is_part else 0.0, why="trial"
                )
            }
        found = {"none": Plan(0, why="trial")}
        kept = np.sort(survival[survival > best.threshold])
        if len(kept) > len(survival):
            found["less"] = Plan(best.num_draft_tokens, float(kept[len(survival) - 1]), why="trial")
        if len(kept) < survival.size:
            found["whole"] = Plan(best.num_draft_tokens, why="trial")
        return found

    def _settle(self, outlook: Outlook, best: Choice) -> None:
        """Pays or gets back the difference between what the last trial was expected to lose and
        what it is now known to."""
        if self._unsettled is not None:
            plan, num_reqs, steps, paid = self._unsettled
            if power(num_reqs) == power(best.num_reqs):
                self._budget += paid - steps * outlook.loss(best, plan)
            self._unsettled = None

    def until_next(self, step: int, seconds: float, next_choice: int) -> float:
        """Seconds until something is tried, after ``step`` steps and with more that take
        ``seconds`` each; the next choice is at step ``next_choice``."""
        loss, tried = self._needs
        most = _SAVED * seconds
        saved = (loss - self._budget) / EXPLORATION if loss <= most else math.inf
        owed = -self._budget / EXPLORATION
        credited = max((tried + _patience(loss, most) - step) * seconds, owed)
        soonest = max(self._last + self._apart, next_choice) - step
        return max(soonest * seconds, min(saved, credited), 0.0)


def _patience(loss: float, most: float) -> float:
    """Steps until a trial that loses so many seconds is made on credit: what can be saved up for,
    ``most``, is left to that for as long as it may take."""
    return STALE if loss > most else _SAVED / EXPLORATION

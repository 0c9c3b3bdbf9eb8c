"""Now and then what does not look best is tried, to learn what it costs and brings; what that is
expected to lose is paid from a budget, a share of the time that has passed. Pure.

The budget is kept apart for each batch size, up to the nearest power of two, and in steps that are
as long as those that look best: neither another batch size nor the machine's pace adds to it.

What was measured wrong once must not stand for good. A trial that no budget would ever pay for is
made on credit after ``STALE`` steps, any other after ``_SAVED`` / ``EXPLORATION``, unless the
budget is overdrawn. What it loses is charged afterwards, by what it is then known to cost, and is
never more than its rows would cost as plain steps of their own: 4 ``block_size`` plain steps for a
trial of two. No more than that is ever owed, whatever was charged: a draft that writes the context
of the steps before it may take longer, but does it once for each position, however seldom drafts
are. So a trial comes within ``_SAVED`` / ``EXPLORATION`` steps of the batch size and the longest
time between two choices where nothing is owed, else within 4 ``block_size`` / ``EXPLORATION`` and
three such times: until what a trial lost may be charged, until it is, and until the next choice.

    pytest tests/unit/test_adaptive_stale.py tests/unit/test_adaptive_off.py
"""

import math
from dataclasses import dataclass, field

import numpy as np

from vllm_dflash.adaptive.cost import STALE, power
from vllm_dflash.adaptive.plans import Choice, Outlook, Plan

EXPLORATION = 0.0075
"""Share of the time that may be lost to trying what does not look best."""
_TRIAL_DRAFTS = 8
"""Most steps of a trial of drafting: where that is about as good as none, more is learned at no
cost."""
_SAVED = 10
"""Steps that the budget may grow to."""
_FIRST = 2 * STALE * EXPLORATION
"""Steps in it at first, as if twice ``STALE`` had passed: first figures are the least sure."""


@dataclass
class _Size:
    """What is kept for about as many requests; times are numbers of steps."""

    begun: int
    """When there was first something to choose."""
    budget: float = _FIRST
    """Steps; below 0 where they are owed."""
    count: int = 0
    """Choices."""
    last: int = 0
    """When something was last tried."""
    tried: dict[str, int] = field(default_factory=dict)
    """The same for each kind of trial."""
    uncharged: tuple[Plan, int, float] | None = None
    """The last trial: its plan, its steps and the steps that were paid for it."""


class Trials:
    """The budgets, and what was tried when; ``apart``: fewest steps between two trials."""

    def __init__(self, apart: int, block_size: int) -> None:
        # Two steps with a block of the drafter's rows and one of the target's.
        self._apart, self._most_owed = apart, 2 * 2 * block_size
        self._sizes: dict[int, _Size] = {}
        """By power of two of the requests."""
        self._now = _Size(0)
        """The one that was chosen for last."""
        self._seconds = 1.0
        """Of a step that looked best then."""
        self._needs = 0.0, 0
        """Steps that the next trial is expected to lose, and when it was last made."""

    def earn(self, num_steps: int) -> None:
        """So many steps have passed since the last choice."""
        self._now.budget = min(self._now.budget + num_steps * EXPLORATION, _SAVED)

    def charge(self, seconds: float, usual: float) -> None:
        """A step was ``seconds`` long for what it caught up with, and would have been ``usual``."""
        self._now.budget -= min(seconds - usual, _SAVED * usual) / self._seconds

    def choose(self, step: int, outlook: Outlook, best: Choice, draft: Plan) -> list[Plan]:
        """Plans of the next steps: what does not look best, if it was not tried for long and the
        budget pays for it, or gives credit; empty where nothing is tried."""
        now = self._now = self._sizes.setdefault(power(best.num_reqs), _Size(step))
        self._seconds = outlook.expected(best.plan)[1] / best.rate
        now.count += 1
        is_early = step - now.last < self._apart
        if not is_early:
            self._charge_last(outlook, best)
        candidates = self._candidates(outlook.survival, best.plan, draft)
        turn = "less" if now.count % 2 and "less" in candidates else "none"
        # What waited longest comes first; out of its turn only on credit.
        for kind in sorted(candidates, key=lambda kind: now.tried.get(kind, now.begun)):
            plan, tried = candidates[kind], now.tried.get(kind, now.begun)
            loss = outlook.loss(best, plan) / self._seconds
            # The first step without a draft still verifies what was drafted before, and the first
            # with one brings the context up to date: only the second is like those that would
            # follow.
            steps = 1 if best.plan.num_draft_tokens and plan.num_draft_tokens else 2
            self._needs = steps * loss, tried
            is_credited = now.budget >= 0 and step - tried >= _patience(steps * loss)
            is_paid = (
                kind in (turn, "part") + ("whole",) * (not best.plan.num_draft_tokens)
                and steps * loss <= now.budget
            )
            if is_early or not (is_paid or is_credited):
                continue
            if not best.plan.num_draft_tokens:
                steps = max(steps, min(_TRIAL_DRAFTS, int(now.budget / max(loss, 1e-9))))
            now.budget -= steps * loss
            now.last = now.tried[kind] = step
            now.uncharged = None if is_paid else (plan, steps, steps * loss)
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
            is_part = self._now.count % 4 and bool((survival > draft.threshold).any())
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

    def _charge_last(self, outlook: Outlook, best: Choice) -> None:
        """Pays or gets back the difference between what the last trial was expected to lose and
        what it is now known to, and forgives what is owed beyond the dearest trial."""
        now = self._now
        if now.uncharged is not None:
            plan, steps, paid = now.uncharged
            now.budget += paid - steps * outlook.loss(best, plan) / self._seconds
            now.uncharged = None
        now.budget = max(now.budget, -self._most_owed)

    def until_next(self, step: int, seconds: float, next_choice: int) -> float:
        """Seconds until something is tried, after ``step`` steps and with more that take
        ``seconds`` each; the next choice is at step ``next_choice``."""
        (loss, tried), budget = self._needs, max(self._now.budget, -self._most_owed)
        saved = (loss - budget) / EXPLORATION if loss <= _SAVED else math.inf
        credited = max(tried + _patience(loss) - step, -budget / EXPLORATION)
        soonest = max(self._now.last + self._apart, next_choice) - step
        return max(soonest, min(saved, credited), 0.0) * seconds


def _patience(loss: float) -> float:
    """Steps until a trial that loses so many is made on credit: what can be saved up for is left to
    that for as long as it may take."""
    return STALE if loss > _SAVED else _SAVED / EXPLORATION

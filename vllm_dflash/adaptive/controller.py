"""How many tokens to draft in a step, and how many of each request's to verify: as many as commit the most tokens a second. Pure.

Drafting K tokens a request and verifying some of them commits one token a request, and each draft token with the probability that
it and all before it are accepted; ``StepCost`` knows the seconds, ``Acceptance`` the probabilities. The best K has the highest
ratio, K = 0 among them. Now and then another K is tried, to learn what it costs and brings; what that is expected to lose is paid
from a budget, a share of the time that has passed.

    pytest tests/unit/test_adaptive.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dflash.adaptive.acceptance import Acceptance
from vllm_dflash.adaptive.cost import LocalCost, StepCost, Work

EXPLORATION = 0.01
"""Share of the time that may be lost to trying what does not look best."""
_FIRST_TRIES = 3
"""Steps that each of a whole block and no draft gets at once, for a batch size that was not seen."""
_EVERY = 8
"""Steps between two choices of K, unless the number of requests changes by more than an eighth."""
_SWITCH = 1.01
"""Another K has to be better by this factor, so that noise does not make K jump."""


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and of it to verify in the next."""

    num_draft_tokens: int
    """K of the step; 0 for no drafter forward."""
    lengths: Mapping[str, int]
    """By request, how many of its draft tokens are worth verifying; at most K."""


@dataclass(frozen=True)
class _Choice:
    """The K of the next steps."""

    num_draft_tokens: int
    threshold: float
    """Probability of acceptance above which a draft token is worth verifying."""
    num_reqs: int
    rate: float
    """Expected committed tokens a second."""


class Controller:
    """Learns from steps and plans the next. ``max_draft`` is the longest draft, in tokens."""

    def __init__(self, max_draft: int) -> None:
        self.max_draft, self.cost, self.acceptance = max_draft, StepCost(), Acceptance(max_draft)
        self._budget, self._steps, self._chosen_at = 0.0, 0, 0
        self._tries: list[int] = []
        self._tried_at = [0] * (max_draft + 1)
        self._choice: _Choice | None = None

    def observe(self, work: Work, seconds: float, outcomes: Mapping[str, tuple[int, int]]) -> None:
        """Takes in a step of decoding.

        Args:
            work: what the step computed.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
        """
        self.cost.observe(work, seconds)
        self._budget = min(self._budget + EXPLORATION * seconds, 10 * seconds)
        for request, (verified, accepted) in outcomes.items():
            self.acceptance.observe(request, verified, accepted)

    def plan(self, requests: Sequence[str]) -> Plan:
        """What to draft for these requests, which all decode."""
        self._steps += 1
        tried = self._try(requests)
        k = self._choice.num_draft_tokens if tried is None and self._choice else tried or 0
        self._tried_at[k] = self._steps
        # What is tried is verified whole: that is how positions that did not pay are seen to pay again.
        if tried is None and self._choice:
            return Plan(k, self.acceptance.lengths(requests, k, self._choice.threshold))
        return Plan(k, dict.fromkeys(requests, k))

    def forget(self, request: str) -> None:
        """A request has ended."""
        self.acceptance.forget(request)

    def _try(self, requests: Sequence[str]) -> int | None:
        """Sets ``_choice`` where it is time to; returns a K to try in its stead, or None."""
        if not self._tries and not self.cost.has_seen(len(requests)):
            self._tries = [self.max_draft] * _FIRST_TRIES + [0] * _FIRST_TRIES
        if self._tries:
            self._choice = None
            return self._tries.pop(0)
        last = self._choice
        if last and self._steps - self._chosen_at < _EVERY and abs(len(requests) - last.num_reqs) * 8 <= last.num_reqs:
            return None
        self._chosen_at = self._steps
        cost, survival = self.cost.near(len(requests)), self.acceptance.survival(requests)
        choices = [self._weigh(cost, survival, k) for k in range(self.max_draft + 1)]
        best = max(choices, key=lambda choice: choice.rate)
        if last and choices[last.num_draft_tokens].rate * _SWITCH > best.rate:
            best = choices[last.num_draft_tokens]
        self._choice = best
        return self._experiment(cost, survival, best)

    def _experiment(self, cost: LocalCost, survival: np.ndarray, best: _Choice) -> int | None:
        """Of the K that the budget pays for, the one that was not tried for longest; None for none."""
        # A whole block shows every position, and none what it costs to do without; between them the model knows by itself.
        others = {0, min(best.num_draft_tokens + 1, self.max_draft), self.max_draft} - {best.num_draft_tokens}
        k = min(others, key=lambda k: self._tried_at[k])
        num_reqs = len(survival)
        seconds = cost.seconds(Work(num_reqs, num_reqs * (k + 1), num_reqs * (k + 1) if k else 0))
        loss = max(seconds - (num_reqs + float(survival[:, :k].sum())) / best.rate, 0.0)
        if loss > self._budget or self._steps - self._tried_at[k] < 2 * _EVERY:
            return None
        self._budget -= loss
        return k

    @staticmethod
    def _weigh(cost: LocalCost, survival: np.ndarray, k: int) -> _Choice:
        """Steps that draft ``k`` tokens a request and verify those that commit more in their time than the step as a whole does.

        ``survival`` falls along a row, so the tokens above a threshold are each request's first ones. The threshold is the price
        of a verified token at the rate of the whole, which only rises as tokens below it are left out: the maximum of a ratio of
        linear sums (Dinkelbach, 1967).
        """
        num_reqs, price = len(survival), cost.seconds_per_verified
        rows, candidates, threshold = num_reqs * (k + 1) if k else 0, survival[:, :k], 0.0
        while True:
            kept = candidates[candidates > threshold]
            rate = (num_reqs + float(kept.sum())) / cost.seconds(Work(num_reqs, num_reqs + len(kept), rows))
            if rate * price <= threshold * (1 + 1e-6):
                return _Choice(k, threshold, num_reqs, rate)
            threshold = rate * price

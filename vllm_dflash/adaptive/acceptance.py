"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times three factors: what confidences are worth, what its position
is, and what its request is. Each is accepted tokens over expected ones, older ones fading, and the
first two are known apart for groups of requests: of a sampled one drafts are accepted less than of
a greedy one. Where no confidences are known, the usual one stands for each. Steps are learned from
when something is to be expected, many at once: an array's arithmetic takes as long as one number's.

    pytest tests/unit/test_adaptive.py
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.steps import Names

Array = np.ndarray
Row = Sequence[float]
"""The probability that the drafter gives each token of a draft."""
Confidences = Mapping[str, Row] | None
"""By request, of its draft; None where none are known."""
GroupOf = Callable[[str], Hashable]
"""Which of a request's kind are accepted alike, and have the same limit."""
LimitOf = Callable[[str], int] | None
"""The draft tokens that a request may have; None for no limit."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""


class _Group:
    """What was learned of one group of requests: accepted tokens over expected ones, older ones
    fading."""

    def __init__(self, limit: int, usual: Row, tuning: Tuning) -> None:
        self._memory = tuning.memory
        self._worth = np.ones(1), np.full(1, tuning.prior)
        """Of a confidence, and the expected tokens that this is based on."""
        self._positions = (np.arange(len(usual)) < limit) * 1.0, np.full(1, tuning.prior)
        """The same of each position, 0 where there is none."""
        self.rates: Row = self._positions[0].tolist()
        """Both, [K]."""
        self.recent: deque[Row] = deque([usual], tuning.recent)
        """Confidences of the last drafts, [K] each."""
        self.outcomes: list[tuple[_Request, Row, int, int]] = []
        """What became of drafts, and was not looked at yet."""

    def look(self) -> None:
        """Learns from what was not looked at yet."""
        of, said, *ends = zip(*self.outcomes, strict=True)
        self.outcomes.clear()
        verified, accepted = np.array(ends)[..., None]
        at = np.arange(len(self.rates))
        seen, hits = (at < np.minimum(accepted + more, verified) for more in (1, 0))
        expected = seen * np.fromiter(chain(*said), float).reshape(seen.shape)
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice. What is a request's own is learned slowly at any time.
        self._worth = self._mix(*self._worth, hits.sum(), expected.sum())
        expected *= self._worth[0]
        self._positions = self._mix(*self._positions, hits.sum(0), expected.sum(0))
        self.rates = (self._worth[0] * self._positions[0]).tolist()
        totals = (expected @ self._positions[0]).tolist()
        for request, hit, total in zip(of, hits.sum(1).tolist(), totals, strict=True):
            request.learn(hit, total, self._memory)

    def _mix(
        self, known: Array, weight: Array, hits: Array, expected: Array
    ) -> tuple[Array, Array]:
        """Accepted tokens over expected ones with these of both more, and the expected ones."""
        kept = np.minimum(weight, np.maximum(self._memory - expected, 0.0))
        return (known * kept + hits) / (kept + expected), kept + expected


class _Request:
    """One request's group, and what is its own."""

    def __init__(self, group: _Group) -> None:
        self.group, self.factor = group, 1.0

    def learn(self, hits: float, expected: float, memory: float) -> None:
        self.factor += (hits - expected * self.factor) / memory


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions, K."""

    def __init__(self, max_draft: int, tuning: Tuning, group: GroupOf, limit: LimitOf) -> None:
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, _Request] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(self, outcomes: Outcomes, said: Confidences = None) -> None:
        """Takes in what became of drafts with these confidences."""
        for request, (name, ends) in zip(map(self._of, outcomes), outcomes.items(), strict=True):
            request.group.outcomes.append((request, self._row(name, said), *ends))

    def drafted(self, names: Names, prices: Row, said: Confidences) -> list[list[float]]:
        """``survival`` of drafts that were made, each up to the first token that has no more than
        its price; ``expected`` goes by the last ones."""
        for name in filter((said or {}).get, said or {}):
            self._of(name).group.recent.append(self._row(name, said))
        return [self.survival(name, said, price) for name, price in zip(names, prices, strict=True)]

    def survival(self, name: str, said: Confidences = None, price: float = 0.0) -> list[float]:
        """Probability that a draft with these confidences is accepted up to and with each position
        that its request may have; by what was learned when ``expected`` was last asked."""
        request, row, probability, found = self._of(name), self._row(name, said), 1.0, []
        for rate, confidence in zip(request.group.rates, row, strict=True):
            probability *= min(confidence * rate * request.factor, 1.0)
            if not probability:
                break
            found.append(probability)
            if probability <= price:
                break
        return found

    def expected(self, requests: Names) -> np.ndarray:
        """float64 [n, m, K]: survival of whole drafts as they are to be expected of each request:
        of its group's last ones, where confidences are known. How far drafts differ decides what it
        brings to verify only part of some."""
        of, count = [*map(self._of, requests)], len(requests)
        for group in {request.group for request in of if request.group.outcomes}:
            group.look()
        recent = [[*request.group.recent] for request in of]
        each = range(-(-max(map(len, recent)) // count))
        rows = [[r[(i + j * count) % len(r)] for j in each] for i, r in enumerate(recent)]
        rates = [[[rate * r.factor for rate in r.group.rates]] for r in of]
        return np.minimum(np.array(rows) * rates, 1.0).cumprod(2)

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _row(self, name: str, said: Confidences) -> Row:
        """The usual confidences where none are known."""
        row = (said and said.get(name)) or self._usual
        return row if len(row) == len(self._usual) else [*row, *self._usual[len(row) :]]

    def _of(self, name: str) -> _Request:
        if name not in self._requests:
            new = _Group(self._limit(name), self._usual, self._tuning)
            self._requests[name] = _Request(self._groups.setdefault(self._group(name), new))
        return self._requests[name]

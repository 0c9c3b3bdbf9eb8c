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

Row = Sequence[float]
"""The probability that the drafter gives each token of a draft."""
Confidences = Mapping[str, Row] | None
"""By request, of its draft: all K or none; None where none are known."""
GroupOf = Callable[[str], Hashable]
"""Which of a request's kind are accepted alike, and have the same limit."""
LimitOf = Callable[[str], int] | None
"""The draft tokens that a request may have; None for no limit."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""


_Known = tuple[float, float]
"""Accepted tokens over expected ones, and the expected ones that this is based on."""


class _Group:
    """What was learned of one group of requests: accepted tokens over expected ones, older ones
    fading."""

    def __init__(self, limit: int, usual: Row, tuning: Tuning) -> None:
        self._memory = tuning.memory
        self._worth: _Known = 1.0, tuning.prior
        """Of a confidence."""
        self._positions = [(float(i < limit), tuning.prior) for i in range(len(usual))]
        """Of each position, 0 where there is none."""
        self.rates = [known for known, _ in self._positions]
        """Both's product, [K]."""
        self.recent: deque[Row] = deque([usual], tuning.recent)
        """Confidences of the last drafts, [K] each."""
        self.outcomes: tuple[list[_Request], list[Row], list[int], list[int]] = [], [], [], []
        """Of drafts that were not looked at yet: whose, confidences, tokens that were accepted, and
        those whose turn came. An object for each would be the garbage collector's work."""

    def look(self) -> None:
        """Learns from what was not looked at yet."""
        of: list[_Request] = self.outcomes[0]
        (_, said, *ends), self.outcomes = self.outcomes, ([], [], [], [])
        hits, seen = np.fromiter(chain(*ends), int).reshape(2, -1, 1) > np.arange(len(self.rates))
        expected = seen * np.fromiter(chain(*said), float).reshape(seen.shape)
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice. What is a request's own is learned slowly at any time.
        right, sums = hits.sum(0).tolist(), expected.sum(0).tolist()
        worth, _ = self._worth = self._mix(self._worth, sum(right), sum(sums))
        each = zip(self._positions, right, sums, strict=True)
        self._positions = [self._mix(known, hit, worth * total) for known, hit, total in each]
        self.rates = [worth * known for known, _ in self._positions]
        totals = (expected @ self.rates).tolist()
        for request, hit, total in zip(of, hits.sum(1).tolist(), totals, strict=True):
            request.factor += (hit - total * request.factor) / self._memory

    def _mix(self, known: _Known, hits: float, expected: float) -> _Known:
        """With these of both more."""
        kept = min(known[1], max(self._memory - expected, 0.0))
        return (known[0] * kept + hits) / (kept + expected), kept + expected


class _Request:
    """One request's group, and what is its own."""

    def __init__(self, group: _Group) -> None:
        self.group, self.factor = group, 1.0


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions, K."""

    def __init__(self, max_draft: int, tuning: Tuning, group: GroupOf, limit: LimitOf) -> None:
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, _Request] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(self, outcomes: Outcomes, said: Confidences = None) -> None:
        """Takes in what became of drafts with these confidences."""
        said, usual = said or {}, self._usual
        for name, (verified, accepted) in outcomes.items():
            request = self._of(name)
            of, rows, hits, seen = request.group.outcomes
            of.append(request)
            rows.append(said.get(name) or usual)
            hits.append(accepted)
            seen.append(accepted + (accepted < verified))

    def drafted(self, names: Names, prices: Row, said: Confidences = None) -> list[list[float]]:
        """Of drafts that were made, with these confidences: the probability that each is accepted
        up to and with each position that its request may have, up to the first token that has no
        more than its price. By what was learned when ``expected`` was last asked, which goes by the
        last drafts."""
        said = said or {}
        survivals: list[list[float]] = [[] for _ in names]
        for name, price, found in zip(names, prices, survivals, strict=True):
            request, probability = self._of(name), 1.0
            group, factor = request.group, request.factor
            if row := said.get(name):
                group.recent.append(row)
            for rate, confidence in zip(group.rates, row or self._usual, strict=False):
                once = confidence * rate * factor
                if once < 1.0:
                    probability *= once
                    if not probability:
                        break
                found.append(probability)
                if probability <= price:
                    break
        return survivals

    def expected(self, requests: Names) -> np.ndarray:
        """float64 [n, m, K]: survival of whole drafts as they are to be expected of each request:
        of its group's last ones, where confidences are known. How far drafts differ decides what it
        brings to verify only part of some."""
        of, count = [*map(self._of, requests)], len(requests)
        for group in {request.group for request in of if request.group.outcomes[0]}:
            group.look()
        each = range(-(-max(len(r.group.recent) for r in of) // count))
        lasts = ((i, r.group.recent) for i, r in enumerate(of))
        rows = [last[(i + j * count) % len(last)] for i, last in lasts for j in each]
        rates = np.array([[[rate * r.factor for rate in r.group.rates]] for r in of])
        said = np.fromiter(chain(*rows), float).reshape(count, len(each), -1)
        return np.minimum(said * rates, 1.0).cumprod(2)

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _of(self, name: str) -> _Request:
        if name not in self._requests:
            new = _Group(self._limit(name), self._usual, self._tuning)
            self._requests[name] = _Request(self._groups.setdefault(self._group(name), new))
        return self._requests[name]

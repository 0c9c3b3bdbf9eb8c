"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times what such confidences were worth at its position, times what
its request accepts beside others. Both factors are accepted tokens over expected ones, older ones
fading, and known apart for groups of requests: of a sampled one drafts are accepted less than of a
greedy one. Where no confidences are known, the usual one stands for each.

    pytest tests/unit/test_adaptive.py
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from heapq import nlargest
from operator import neg

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import round_rows

Confidences = Mapping[str, Sequence[float]]
"""By request, the probability that the drafter gives each token of its draft."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""
_BINS = 16
"""Of a confidence; one of 1 has a bin of its own."""


class _Factor:
    """Accepted tokens over expected ones, older ones fading; and the expected ones."""

    __slots__ = ("value", "weight")

    def __init__(self, weight: float) -> None:
        self.value, self.weight = 1.0, weight

    def add(self, accepted: float, expected: float, memory: float) -> None:
        """So many more."""
        self.weight = weight = min(self.weight + expected, memory)
        self.value += (accepted - expected * self.value) / weight


class _Group:
    """What was learned of one group of requests. What is a position's or a request's own is learned
    slower than what a confidence is worth to all."""

    def __init__(self, limit: int, tuning: Tuning) -> None:
        self.bins = [_Factor(tuning.prior) for _ in range(_BINS + 1)]
        self.positions = [_Factor(tuning.memory) for _ in range(limit)]
        self.recent: deque[Sequence[float] | None] = deque([None], tuning.recent)
        """Confidences of the last drafts, [K] each."""


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(
        self,
        max_draft: int,
        tuning: Tuning,
        group: Callable[[str], Hashable] = lambda _: None,
        limit: Callable[[str], int] | None = None,
    ) -> None:
        """``group``: which of a request's kind are accepted alike, and have the same limit;
        ``limit``: the draft tokens that a request may have, ``max_draft`` where left out."""
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, tuple[_Group, _Factor]] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(
        self, request: str, verified: int, accepted: int, said: Sequence[float] | None = None
    ) -> None:
        """Takes in that of ``verified`` draft tokens, drafted with these confidences, the first
        ``accepted`` were accepted."""
        (group, own), memory, total = self._of(request), self._tuning.memory, 0.0
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice.
        for i, confidence in enumerate((said or self._usual)[: min(accepted + 1, verified)]):
            worth, position = group.bins[int(confidence * _BINS)], group.positions[i]
            worth.add(i < accepted, confidence, memory)
            expected = confidence * worth.value
            position.add(i < accepted, expected, memory)
            total += expected * position.value
        own.add(min(accepted, verified), total, memory)

    def lengths(
        self, requests: Sequence[str], prices: Sequence[float], confidences: Confidences
    ) -> list[int]:
        """Of each request's draft tokens, how many are accepted with a probability above its price.
        Remembers the drafts for ``expected``.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are
        made anew for each number of rows.
        """
        found, inside, outside = [], [], []
        for i, (request, price) in enumerate(zip(requests, prices, strict=True)):
            if said := confidences.get(request):
                self._of(request)[0].recent.append(said)
            survival = self.survival(request, said)
            count = bisect_left(survival, -price, key=neg)
            if count:
                inside.append((price - survival[count - 1], i))
            if count < len(survival) and survival[count]:
                outside.append((survival[count] - price, i))
            found.append(count)
        rows = len(found) + sum(found)
        missing = round_rows(rows) - rows
        for _, i in nlargest(abs(missing), outside if missing > 0 else inside) if missing else ():
            found[i] += 1 if missing > 0 else -1
        return found

    def survival(self, request: str, said: Sequence[float] | None = None) -> list[float]:
        """[K]: probability that a draft with these confidences is accepted up to and with each
        position; past the request's limit 0."""
        (group, own), probability, found = self._of(request), 1.0, []
        factor, bins = own.value, group.bins
        for position, confidence in zip(group.positions, said or self._usual, strict=False):
            once = confidence * bins[int(confidence * _BINS)].value * position.value * factor
            probability *= min(once, 1.0)
            found.append(probability)
        return found + [0.0] * (len(self._usual) - len(found))

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, m, K]: survival of whole drafts as they are to be expected of each request:
        of its group's last ones, where confidences are known. How far drafts differ decides what it
        brings to verify only part of some."""
        recent = [self._of(request)[0].recent for request in requests]
        each = range(-(-max(map(len, recent)) // len(requests)))
        return np.array(
            [
                [self.survival(request, drafts[(i + j * len(requests)) % len(drafts)]) for j in each]
                for i, (request, drafts) in enumerate(zip(requests, recent, strict=True))
            ]
        )

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _of(self, request: str) -> tuple[_Group, _Factor]:
        known = self._requests.get(request)
        if known is None:
            key, tuning = self._group(request), self._tuning
            if key not in self._groups:
                self._groups[key] = _Group(self._limit(request), tuning)
            known = self._requests[request] = self._groups[key], _Factor(tuning.memory)
        return known

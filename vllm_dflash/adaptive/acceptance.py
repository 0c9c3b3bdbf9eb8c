"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times what such confidences were worth at its position, times what
its request accepts beside others. Both factors are accepted tokens over expected ones, older ones
fading, and known apart for groups of requests: of a sampled one drafts are accepted less than of a
greedy one. Where no confidences are known, the usual one stands for each.

    pytest tests/unit/test_adaptive.py
"""

from collections import deque
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from heapq import nlargest

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
    """What was learned of one group of requests."""

    def __init__(self, limit: int, tuning: Tuning) -> None:
        self.bins = [_Factor(tuning.prior) for _ in range(_BINS + 1)]
        self.positions = [_Factor(tuning.memory) for _ in range(limit)]
        self.recent: deque[Sequence[float]] = deque(maxlen=tuning.recent)
        """Confidences of the last drafts, [K] each."""


class _Request(_Factor):
    """What was learned of one request."""

    __slots__ = ("group",)

    def __init__(self, group: _Group, weight: float) -> None:
        super().__init__(weight)
        self.group = group


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
        self._max_draft, self._tuning, self._group = max_draft, tuning, group
        self._limit = limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, _Request] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(
        self, name: str, verified: int, accepted: int, confidences: Sequence[float] | None = None
    ) -> None:
        """Takes in that of ``verified`` draft tokens the first ``accepted`` were accepted."""
        request, memory, expected = self._of(name), self._tuning.memory, 0.0
        bins, positions = request.group.bins, request.group.positions
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice.
        for i, confidence in enumerate((confidences or self._usual)[: min(accepted + 1, verified)]):
            each, position = bins[int(confidence * _BINS)], positions[i]
            each.add(i < accepted, confidence, memory)
            once = confidence * each.value
            position.add(i < accepted, once, memory)
            expected += once * position.value
        request.add(min(accepted, verified), expected, memory)

    def lengths(
        self, requests: Sequence[str], prices: Sequence[float], confidences: Confidences | None
    ) -> list[int]:
        """Of each request's draft tokens, how many are accepted with a probability above its price.
        Remembers the drafts for ``expected``.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are
        made anew for each number of rows.
        """
        found, inside, outside = [], [], []
        for i, (name, price) in enumerate(zip(requests, prices, strict=True)):
            request, row = self._of(name), self._usual
            if confidences and (own := confidences.get(name)):
                row = own
                request.group.recent.append(row)
            factor, bins = request.value, request.group.bins
            probability, count, kept = 1.0, 0, 0.0
            for position, confidence in zip(request.group.positions, row, strict=False):
                once = confidence * bins[int(confidence * _BINS)].value * position.value * factor
                if once < 1.0:
                    probability *= once
                if probability <= price:
                    outside.append((probability - price, i))
                    break
                kept, count = probability, count + 1
            if count:
                inside.append((price - kept, i))
            found.append(count)
        rows = len(found) + sum(found)
        missing = round_rows(rows) - rows
        for _, i in nlargest(abs(missing), outside if missing > 0 else inside) if missing else ():
            found[i] += 1 if missing > 0 else -1
        return found

    def survival(self, name: str, row: Sequence[float] | None = None) -> list[float]:
        """[K]: probability that a draft with these confidences is accepted up to and with each
        position; past the request's limit 0."""
        request, probability, found = self._of(name), 1.0, []
        factor, bins = request.value, request.group.bins
        for position, confidence in zip(request.group.positions, row or self._usual, strict=False):
            once = confidence * bins[int(confidence * _BINS)].value * position.value * factor
            if once < 1.0:
                probability *= once
            found.append(probability)
        return found + [0.0] * (self._max_draft - len(found))

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, m, K]: survival of whole drafts as they are to be expected of each request:
        of its group's last ones, where confidences are known. How far drafts differ decides what it
        brings to verify only part of some."""
        recent = [self._of(name).group.recent or (None,) for name in requests]
        each = -(-max(map(len, recent)) // len(requests))
        return np.array(
            [
                [self.survival(name, rows[(i * each + j) % len(rows)]) for j in range(each)]
                for i, (name, rows) in enumerate(zip(requests, recent, strict=True))
            ]
        )

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]

    def _of(self, name: str) -> _Request:
        request = self._requests.get(name)
        if request is None:
            key, tuning = self._group(name), self._tuning
            if key not in self._groups:
                self._groups[key] = _Group(self._limit(name), tuning)
            request = self._requests[name] = _Request(self._groups[key], tuning.memory)
        return request

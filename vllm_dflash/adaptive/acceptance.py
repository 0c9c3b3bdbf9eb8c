"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times what such confidences were worth at its position, times what
its request accepts beside others. Both factors are accepted tokens over expected ones, older ones
fading, and known apart for groups of requests: of a sampled one drafts are accepted less than of a
greedy one. Where no confidences are known, the usual one stands for each.

    pytest tests/unit/test_adaptive.py
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning

Said = Sequence[float] | None
"""The probability that the drafter gives each token of a draft, where known."""
Confidences = Mapping[str, Sequence[float]] | None
"""By request, of its draft; None where none are known."""
GroupOf = Callable[[str], Hashable]
"""Which of a request's kind are accepted alike, and have the same limit."""
LimitOf = Callable[[str], int] | None
"""The draft tokens that a request may have; None for no limit."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""
_BINS = 16
"""Of a confidence; one of 1 has a bin of its own."""


class _Factor:
    """Accepted tokens over expected ones, older ones fading; and the expected ones."""

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
        self.recent: deque[Said] = deque([None], tuning.recent)
        """Confidences of the last drafts, [K] each."""


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(self, max_draft: int, tuning: Tuning, group: GroupOf, limit: LimitOf) -> None:
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, tuple[_Group, _Factor]] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(self, request: str, verified: int, accepted: int, said: Said = None) -> None:
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

    def drafted(self, request: str, said: Said) -> list[float]:
        """``survival`` of a draft that was made; ``expected`` goes by the last ones."""
        if said:
            self._of(request)[0].recent.append(said)
        return self.survival(request, said)

    def survival(self, request: str, said: Said = None) -> list[float]:
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
        recent, count = [self._of(request)[0].recent for request in requests], len(requests)
        each = range(-(-max(map(len, recent)) // count))
        rows = [
            self.survival(request, known[(i + j * count) % len(known)])
            for i, (request, known) in enumerate(zip(requests, recent, strict=True))
            for j in each
        ]
        return np.array(rows).reshape(count, len(each), -1)

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _of(self, request: str) -> tuple[_Group, _Factor]:
        if request not in self._requests:
            new = _Group(self._limit(request), self._tuning)
            group = self._groups.setdefault(self._group(request), new)
            self._requests[request] = group, _Factor(self._tuning.memory)
        return self._requests[request]

"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times three factors: what confidences are worth, what its position
is, and what its request is. Each is accepted tokens over expected ones, older ones fading, and the
first two are known apart for groups of requests: of a sampled one drafts are accepted less than of
a greedy one. Where no confidences are known, the usual one stands for each.

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


class _Group:
    """What was learned of one group of requests: accepted tokens over expected ones, older ones
    fading."""

    def __init__(self, limit: int, tuning: Tuning) -> None:
        self.worth, self.weight = 1.0, tuning.prior
        """Of a confidence, and the expected tokens that this is based on."""
        self.positions, self.weights = [1.0] * limit, [tuning.prior] * limit
        """The same of each position."""
        self.recent: deque[Said] = deque([None], tuning.recent)
        """Confidences of the last drafts, [K] each."""


class _Request:
    """One request's group, and what is its own."""

    def __init__(self, group: _Group) -> None:
        self.group, self.factor = group, 1.0


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(self, max_draft: int, tuning: Tuning, group: GroupOf, limit: LimitOf) -> None:
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, _Request] = {}
        self._usual = [tuning.usual] * max_draft

    def learn(self, name: str, verified: int, accepted: int, said: Said = None) -> None:
        """Takes in that of ``verified`` draft tokens, drafted with these confidences, the first
        ``accepted`` were accepted."""
        request, memory, total = self._of(name), self._tuning.memory, 0.0
        positions, weights = (group := request.group).positions, group.weights
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice. What is a request's own is learned slowly at any time.
        for i, confidence in enumerate((said or self._usual)[: min(accepted + 1, verified)]):
            hit, group.weight = i < accepted, min(group.weight + confidence, memory)
            group.worth += (hit - confidence * group.worth) / group.weight
            expected = confidence * group.worth
            weights[i] = weight = min(weights[i] + expected, memory)
            positions[i] += (hit - expected * positions[i]) / weight
            total += expected * positions[i]
        request.factor += (min(accepted, verified) - total * request.factor) / memory

    def drafted(
        self, requests: Sequence[str], prices: Sequence[float], said: Mapping[str, Sequence[float]]
    ) -> list[list[float]]:
        """``survival`` of drafts that were made, each up to the first token that has no more than
        its price; ``expected`` goes by the last ones."""
        for name in filter(said.get, said):
            self._of(name).group.recent.append(said[name])
        each = zip(requests, prices, strict=True)
        return [self.survival(name, said.get(name), price) for name, price in each]

    def survival(self, name: str, said: Said = None, price: float = -1.0) -> list[float]:
        """Probability that a draft with these confidences is accepted up to and with each position
        that its request may have."""
        request, probability, found = self._of(name), 1.0, []
        factor = request.factor * request.group.worth
        for position, confidence in zip(request.group.positions, said or self._usual, strict=False):
            once = confidence * position * factor
            if once < 1.0:
                probability *= once
            found.append(probability)
            if probability <= price:
                break
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, m, K]: survival of whole drafts as they are to be expected of each request:
        of its group's last ones, where confidences are known. How far drafts differ decides what it
        brings to verify only part of some."""
        recent, count = [self._of(name).group.recent for name in requests], len(requests)
        each = -(-max(map(len, recent)) // count)
        found = np.zeros((count, each, len(self._usual)))
        for i, (name, known) in enumerate(zip(requests, recent, strict=True)):
            for j in range(each):
                row = self.survival(name, known[(i + j * count) % len(known)])
                found[i, j, : len(row)] = row
        return found

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _of(self, name: str) -> _Request:
        if name not in self._requests:
            new = _Group(self._limit(name), self._tuning)
            self._requests[name] = _Request(self._groups.setdefault(self._group(name), new))
        return self._requests[name]

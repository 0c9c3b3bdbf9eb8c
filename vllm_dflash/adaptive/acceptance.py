"""How likely a draft token is accepted, given that all before it were: by its position, its confidence and its request. Pure.

The drafter's confidence in a token is the probability that it gives it. What such a confidence is worth is learned as decoding goes on:
how often tokens of about that confidence were accepted, then corrected for the position in the block and for the request.
Where no confidences are known, a position's rate stands in for them.

    pytest tests/unit/test_adaptive.py
"""

import math
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_PRIOR = 0.6, 4.0
"""Before anything was seen: this rate at each position, with the weight of so many tokens."""
_MEMORY = 500.0
"""Tokens that count; older ones fade."""
_REQUEST_MEMORY, _REQUEST_WEIGHT = 64.0, 6.0
"""Of one request: the expected accepted tokens that count, and how many stand for what all requests do."""
_POSITION_WEIGHT = 20.0
"""Of one position: expected accepted tokens that stand for no correction."""
_MOST = 0.99
_BINS, _FIRST_LOGIT, _BIN_WIDTH = 12, -4.0, 0.8
"""Confidences are told apart by their log-odds."""
_BIN_WEIGHT = 8.0
"""Tokens that stand for a confidence that is worth what it says."""
_RECENT = 64
"""Drafts that stand for those to come."""

Confidences = Mapping[str, Sequence[float]]
"""By request, the probability that the drafter gives each token of its draft."""


@dataclass
class _Rate:
    """Accepted over reached, older ones fading."""

    accepted: float
    reached: float

    @property
    def value(self) -> float:
        return self.accepted / self.reached

    def add(self, accepted: bool) -> None:
        fade = 1 - 1 / _MEMORY
        self.accepted, self.reached = self.accepted * fade + accepted, self.reached * fade + 1


@dataclass
class _Correction:
    """What was accepted over what was expected to be, held to one by ``weight`` expected tokens."""

    weight: float
    memory: float
    accepted: float = 0.0
    expected: float = 0.0

    @property
    def factor(self) -> float:
        return (self.accepted + self.weight) / (self.expected + self.weight)

    def add(self, accepted: float, expected: float) -> None:
        keep = min(1.0, self.memory / max(self.expected, 1e-9))
        self.accepted, self.expected = self.accepted * keep + accepted, self.expected * keep + expected


def _bin(confidence: float) -> int:
    p = min(max(confidence, 1e-6), 1 - 1e-6)
    return min(max(int((math.log(p / (1 - p)) - _FIRST_LOGIT) / _BIN_WIDTH), 0), _BINS - 1)


def _middle(index: int) -> float:
    return 1 / (1 + math.exp(-(_FIRST_LOGIT + (index + 0.5) * _BIN_WIDTH)))


def row_step(count: int) -> int:
    """What numbers of rows about as large as ``count`` are multiples of: there are eight in each octave."""
    return 1 << max(count.bit_length() - 4, 0)


def round_rows(count: int) -> int:
    """The nearest such number."""
    step = row_step(count)
    return (count + step // 2) // step * step


def _round_rows(lengths: dict[str, int], survivals: Mapping[str, Sequence[float]]) -> None:
    """Lets the likeliest tokens that were left out in, or the least likely out, until ``lengths`` and a row a request are a round number."""
    missing = round_rows(len(lengths) + sum(lengths.values())) - len(lengths) - sum(lengths.values())
    for _ in range(abs(missing)):
        if missing > 0:
            can = [(survivals[name][n], name) for name, n in lengths.items() if n < len(survivals[name])]
        else:
            can = [(-survivals[name][n - 1], name) for name, n in lengths.items() if n]
        if can:
            lengths[max(can)[1]] += 1 if missing > 0 else -1


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(self, max_draft: int) -> None:
        rate, weight = _PRIOR
        self._max_draft = max_draft
        self._by_position = [_Rate(rate * weight, weight) for _ in range(max_draft)]
        self._by_confidence = [_Rate(_middle(i) * _BIN_WEIGHT, _BIN_WEIGHT) for i in range(_BINS)]
        self._positions = [_Correction(_POSITION_WEIGHT, _MEMORY) for _ in range(max_draft)]
        self._requests: dict[str, _Correction] = {}
        self._recent: deque[list[float]] = deque(maxlen=_RECENT)

    @property
    def rates(self) -> list[float]:
        """[K]: probability that position i is accepted once all before it are, over all requests."""
        return [rate.value for rate in self._by_position]

    @property
    def calibration(self) -> list[tuple[float, float]]:
        """For each class of confidence its middle, and the probability of acceptance that was found for it."""
        return [(_middle(i), rate.value) for i, rate in enumerate(self._by_confidence)]

    def observe(self, request: str, verified: int, accepted: int, confidences: Sequence[float] | None = None) -> None:
        """Takes in that of ``verified`` draft tokens of a request, drafted with these confidences, the first ``accepted`` were accepted."""
        expected = 0.0
        # Only what is reached fades, so that what is seldom reached keeps its evidence for as long.
        for i in range(min(accepted + 1, verified)):
            by_position = self._by_position[i]
            if confidences is None:
                expected += by_position.value
            else:
                by_confidence = self._by_confidence[_bin(confidences[i])]
                before = by_confidence.value
                expected += min(before * self._positions[i].factor, _MOST)
                by_confidence.add(i < accepted)
                self._positions[i].add(i < accepted, before)
            by_position.add(i < accepted)
        if expected:
            own = self._requests.get(request)
            if own is None:
                own = self._requests[request] = _Correction(_REQUEST_WEIGHT, _REQUEST_MEMORY)
            own.add(accepted, expected)

    def survival(self, request: str, num_draft_tokens: int, confidences: Sequence[float] | None = None) -> list[float]:
        """[K]: probability that a request's draft is accepted up to and with each position; past its confidences by the positions' rates."""
        own, probability, found = self._requests.get(request), 1.0, []
        factor = 1.0 if own is None else own.factor
        known = 0 if confidences is None else len(confidences)
        for i in range(num_draft_tokens):
            if confidences is not None and i < known:
                rate = self._by_confidence[_bin(confidences[i])].value * self._positions[i].factor
            else:
                rate = self._by_position[i].value
            probability *= min(rate * factor, _MOST)
            found.append(probability)
        return found

    def lengths(self, requests: Sequence[str], num_draft_tokens: int, threshold: float, confidences: Confidences | None) -> dict[str, int]:
        """Of each request's draft tokens, how many are accepted with a probability above ``threshold``; remembers drafts for ``expected``.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are made anew for each number of rows.
        """
        found: dict[str, int] = {}
        survivals: dict[str, list[float]] = {}
        for request in requests:
            own = None if confidences is None else confidences.get(request)
            survival = self.survival(request, self._max_draft if own else num_draft_tokens, own)
            if own:
                self._recent.append(survival)
            survivals[request] = survival[:num_draft_tokens]
            found[request] = sum(probability > threshold for probability in survivals[request])
        _round_rows(found, survivals)
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, K]: survival of whole drafts as they are to be expected of these requests.

        The last drafts, where confidences are known: how far drafts differ decides what it brings to verify only part of some.
        """
        if self._recent:
            return np.array(self._recent)
        return np.array([self.survival(request, self._max_draft) for request in requests])

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]

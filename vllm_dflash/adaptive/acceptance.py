"""How likely a draft token is accepted, given that all before it were: by its position, its confidence and its request. Pure.

The drafter's confidence in a token is the probability that it gives it. What such a confidence is worth is learned as decoding goes on:
how often tokens of about that confidence were accepted, then corrected for the position in the block and for the request.
Where no confidences are known, a position's rate stands in for them. All of it by group of requests: of a sampled one drafts are
accepted less than of a greedy one, and what was learned of the one must not decide for the other.

    pytest tests/unit/test_adaptive.py
"""

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
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


def _at(bins: float) -> float:
    """The confidence so many bins above the first one's beginning."""
    return 1 / (1 + math.exp(-(_FIRST_LOGIT + bins * _BIN_WIDTH)))


_EDGES = [_at(index) for index in range(1, _BINS)]


def _bin(confidence: float) -> int:
    return bisect_right(_EDGES, confidence)


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


class _Learned:
    """What was learned of one group of requests."""

    def __init__(self, max_draft: int) -> None:
        rate, weight = _PRIOR
        self.by_position = [_Rate(rate * weight, weight) for _ in range(max_draft)]
        self.by_confidence = [_Rate(_at(i + 0.5) * _BIN_WEIGHT, _BIN_WEIGHT) for i in range(_BINS)]
        self.positions = [_Correction(_POSITION_WEIGHT, _MEMORY) for _ in range(max_draft)]
        self.recent: deque[list[float]] = deque(maxlen=_RECENT)
        self.num_drafts = 0

    def observe(self, verified: int, accepted: int, confidences: Sequence[float] | None) -> float:
        """As ``Acceptance.observe``; returns how many tokens were to be expected."""
        expected = 0.0
        # Only what is reached fades, so that what is seldom reached keeps its evidence for as long.
        for i in range(min(accepted + 1, verified)):
            by_position = self.by_position[i]
            if confidences is None:
                expected += by_position.value
            else:
                by_confidence = self.by_confidence[_bin(confidences[i])]
                before = by_confidence.value
                expected += min(before * self.positions[i].factor, _MOST)
                by_confidence.add(i < accepted)
                self.positions[i].add(i < accepted, before)
            by_position.add(i < accepted)
        self.num_drafts += 1
        return expected

    def survival(self, num_draft_tokens: int, factor: float, confidences: Sequence[float] | None) -> list[float]:
        """As ``Acceptance.survival``, of a request whose tokens are accepted ``factor`` times as often as the group's."""
        probability, found, known = 1.0, [], 0 if confidences is None else len(confidences)
        for i in range(num_draft_tokens):
            if confidences is not None and i < known:
                rate = self.by_confidence[_bin(confidences[i])].value * self.positions[i].factor
            else:
                rate = self.by_position[i].value
            probability *= min(rate * factor, _MOST)
            found.append(probability)
        return found


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(self, max_draft: int, group: Callable[[str], Hashable] = lambda _: None) -> None:
        """``group``: which of a request's kind are accepted alike."""
        self._max_draft, self._group = max_draft, group
        self._learned: dict[Hashable, _Learned] = {}
        self._requests: dict[str, _Correction] = {}
        self.has_news = False
        """Whether as many drafts of a group were seen as were known of it before, since somebody set it back."""

    def rates(self, request: str) -> list[float]:
        """[K]: probability that position i is accepted once all before it are, over all requests of the group."""
        return [rate.value for rate in self._of(request).by_position]

    def observe(self, request: str, verified: int, accepted: int, confidences: Sequence[float] | None = None) -> None:
        """Takes in that of ``verified`` draft tokens of a request, drafted with these confidences, the first ``accepted`` were accepted."""
        learned = self._of(request)
        expected = learned.observe(verified, accepted, confidences)
        self.has_news |= learned.num_drafts.bit_count() == 1
        if expected:
            own = self._requests.get(request)
            if own is None:
                own = self._requests[request] = _Correction(_REQUEST_WEIGHT, _REQUEST_MEMORY)
            own.add(accepted, expected)

    def survival(self, request: str, num_draft_tokens: int, confidences: Sequence[float] | None = None) -> list[float]:
        """[K]: probability that a request's draft is accepted up to and with each position; past its confidences by the positions' rates."""
        own = self._requests.get(request)
        return self._of(request).survival(num_draft_tokens, 1.0 if own is None else own.factor, confidences)

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
                self._of(request).recent.append(survival)
            survivals[request] = survival[:num_draft_tokens]
            found[request] = sum(probability > threshold for probability in survivals[request])
        _round_rows(found, survivals)
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, K]: survival of whole drafts as they are to be expected of these requests.

        Each group's last drafts, in proportion to its requests, where confidences are known: how far drafts differ decides what it
        brings to verify only part of some.
        """
        counts, rows = Counter(map(self._group, requests)), []
        for group, count in counts.items():
            learned = self._learned.get(group)
            drafts = (
                learned.recent if learned and learned.recent else self._survivals(name for name in requests if self._group(name) == group)
            )
            wanted = len(drafts) if len(counts) == 1 else max(round(_RECENT * count / len(requests)), 1)
            rows += [drafts[-1 - i % len(drafts)] for i in range(wanted)]
        return np.array(rows)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]

    def _survivals(self, requests: Iterable[str]) -> list[list[float]]:
        return [self.survival(request, self._max_draft) for request in requests]

    def _of(self, request: str) -> _Learned:
        group = self._group(request)
        learned = self._learned.get(group)
        if learned is None:
            learned = self._learned[group] = _Learned(self._max_draft)
        return learned

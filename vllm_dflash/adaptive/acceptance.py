"""How likely a draft token is accepted, given that all before it were: by its position, its
confidence and its request. Pure.

The drafter's confidence in a token is the probability that it gives it. What such a confidence is
worth is learned as decoding goes on: how often tokens of about that confidence were accepted, then
corrected for the position in the block and for the request. Where no confidences are known, a
position's rate stands in for them. All of it by group of requests: of a sampled one drafts are
accepted less than of a greedy one, and what was learned of the one must not decide for the other.

    pytest tests/unit/test_adaptive.py
"""

import math
import operator
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_PRIOR = 0.6, 4.0
"""Before anything was seen: this rate at each position, with the weight of so many tokens."""
_MEMORY = 500.0
"""Tokens that count; older ones fade."""
_FADE = 1 - 1 / _MEMORY
"""What each new token leaves of the older ones' weight."""
_REQUEST_MEMORY, _REQUEST_WEIGHT = 64.0, 12.0
"""Of one request: the expected accepted tokens that count, and how many stand for what all requests
do."""
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


@dataclass(slots=True)
class _Rate:
    """Accepted over reached, older ones fading."""

    accepted: float
    reached: float
    value: float = 0.0

    def __post_init__(self) -> None:
        self.value = self.accepted / self.reached

    def add(self, accepted: bool) -> None:
        self.accepted = self.accepted * _FADE + accepted
        self.reached = self.reached * _FADE + 1
        self.value = self.accepted / self.reached


@dataclass(slots=True)
class _Correction:
    """What was accepted over what was expected to be, held to one by ``weight`` expected tokens."""

    weight: float
    memory: float
    accepted: float = 0.0
    expected: float = 0.0
    factor: float = 1.0

    def add(self, accepted: float, expected: float) -> None:
        keep = self.memory / self.expected if self.expected > self.memory else 1.0
        self.accepted = self.accepted * keep + accepted
        self.expected = self.expected * keep + expected
        self.factor = (self.accepted + self.weight) / (self.expected + self.weight)


def _at(bins: float) -> float:
    """The confidence so many bins above the first one's beginning."""
    return 1 / (1 + math.exp(-(_FIRST_LOGIT + bins * _BIN_WIDTH)))


_EDGES = [_at(index) for index in range(1, _BINS)]


def row_step(count: int) -> int:
    """What numbers of rows about as large as ``count`` are multiples of: there are four in each
    octave."""
    return 1 << max(count.bit_length() - 3, 0)


def round_rows(count: int) -> int:
    """The nearest such number."""
    step = row_step(count)
    return (count + step // 2) // step * step


def _round_rows(lengths: dict[str, int], survivals: Mapping[str, Sequence[float]]) -> None:
    """Lets the likeliest tokens that were left out in, or the least likely out, until ``lengths``
    and a row a request are a round number."""
    missing = (
        round_rows(len(lengths) + sum(lengths.values())) - len(lengths) - sum(lengths.values())
    )
    for _ in range(abs(missing)):
        if missing > 0:
            can = [
                (survivals[name][n], name)
                for name, n in lengths.items()
                if n < len(survivals[name])
            ]
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
        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice, for it and for the group. Only what is reached fades, so that what is
        # seldom reached keeps its evidence for as long.
        for i in range(min(accepted + 1, verified)):
            by_position = self.by_position[i]
            by_position.add(i < accepted)
            if confidences is None:
                expected += by_position.value
            else:
                by_confidence, position = (
                    self.by_confidence[bisect_right(_EDGES, confidences[i])],
                    self.positions[i],
                )
                by_confidence.add(i < accepted)
                position.add(i < accepted, by_confidence.value)
                rate = by_confidence.value * position.factor
                expected += rate if rate < _MOST else _MOST
        self.num_drafts += 1
        return expected

    def survival(
        self, num_draft_tokens: int, factor: float, confidences: Sequence[float] | None
    ) -> list[float]:
        """As ``Acceptance.survival``, of a request whose tokens are accepted ``factor`` times as
        often as the group's."""
        probability, found = 1.0, []
        for i, confidence in enumerate(
            () if confidences is None else confidences[:num_draft_tokens]
        ):
            rate = (
                self.by_confidence[bisect_right(_EDGES, confidence)].value
                * self.positions[i].factor
                * factor
            )
            probability *= rate if rate < _MOST else _MOST
            found.append(probability)
        for by_position in self.by_position[len(found) : num_draft_tokens]:
            rate = by_position.value * factor
            probability *= rate if rate < _MOST else _MOST
            found.append(probability)
        return found


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(
        self,
        max_draft: int,
        group: Callable[[str], Hashable] = lambda _: None,
        limit: Callable[[str], int] | None = None,
    ) -> None:
        """``group``: which of a request's kind are accepted alike, and have the same limit;
        ``limit``: the draft tokens that a request may have, ``max_draft`` where left out."""
        self._max_draft, self._group = max_draft, group
        self._limit = limit or (lambda _: max_draft)
        self._learned: dict[Hashable, _Learned] = {}
        self._requests: dict[str, tuple[_Learned, _Correction]] = {}
        """What was learned of a request's group, and of itself."""
        self.has_news = False
        """Whether as many drafts of a group were seen as were known of it before, since somebody
        set it back."""

    def rates(self, request: str) -> list[float]:
        """[K]: probability that position i is accepted once all before it are, over all requests of
        the group."""
        return [rate.value for rate in self._of(request)[0].by_position]

    def is_new(self, request: str) -> bool:
        """Whether nothing was observed of a request."""
        known = self._requests.get(request)
        return known is None or not known[1].expected

    def observe(
        self, request: str, verified: int, accepted: int, confidences: Sequence[float] | None = None
    ) -> None:
        """Takes in that of ``verified`` draft tokens of a request, drafted with these confidences,
        the first ``accepted`` were accepted."""
        learned, own = self._of(request)
        own.add(accepted, learned.observe(verified, accepted, confidences))
        self.has_news |= learned.num_drafts.bit_count() == 1

    def survival(
        self, request: str, num_draft_tokens: int, confidences: Sequence[float] | None = None
    ) -> list[float]:
        """[K]: probability that a request's draft is accepted up to and with each position; past
        its confidences by the positions' rates, past its limit 0."""
        learned, own = self._of(request)
        allowed = min(self._limit(request), num_draft_tokens)
        found = learned.survival(allowed, own.factor, confidences)
        return found + [0.0] * (num_draft_tokens - allowed)

    def lengths(
        self,
        requests: Sequence[str],
        num_draft_tokens: int,
        threshold: float,
        confidences: Confidences | None,
    ) -> dict[str, int]:
        """Of each request's draft tokens, how many are accepted with a probability above
        ``threshold``; remembers drafts for ``expected``.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are
        made anew for each number of rows.
        """
        found: dict[str, int] = {}
        survivals: dict[str, list[float]] = {}
        for request in requests:
            own = None if confidences is None else confidences.get(request)
            survival = self.survival(request, self._max_draft if own else num_draft_tokens, own)
            if own:
                self._of(request)[0].recent.append(survival)
            survivals[request] = survival[: min(self._limit(request), num_draft_tokens)]
            found[request] = bisect_left(survivals[request], -threshold, key=operator.neg)
        _round_rows(found, survivals)
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, K]: survival of whole drafts as they are to be expected of these requests.

        Each group's last drafts, in proportion to its requests, where confidences are known: how
        far drafts differ decides what it brings to verify only part of some.
        """
        counts, rows = Counter(map(self._group, requests)), []
        for group, count in counts.items():
            learned = self._learned.get(group)
            drafts = (
                learned.recent
                if learned and learned.recent
                else self._survivals(name for name in requests if self._group(name) == group)
            )
            wanted = (
                len(drafts) if len(counts) == 1 else max(round(_RECENT * count / len(requests)), 1)
            )
            rows += [drafts[-1 - i % len(drafts)] for i in range(wanted)]
        return np.array(rows)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]

    def _survivals(self, requests: Iterable[str]) -> list[list[float]]:
        return [self.survival(request, self._max_draft) for request in requests]

    def _of(self, request: str) -> tuple[_Learned, _Correction]:
        known = self._requests.get(request)
        if known is None:
            group = self._group(request)
            if group not in self._learned:
                self._learned[group] = _Learned(self._max_draft)
            known = self._requests[request] = (
                self._learned[group],
                _Correction(_REQUEST_WEIGHT, _REQUEST_MEMORY),
            )
        return known

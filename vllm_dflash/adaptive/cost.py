"""What a step costs, learned from measured steps: linear in what it computes, near the batch size
at hand. Pure.

A step runs the target over ``num_tokens`` rows and, where it drafts, the drafter over
``draft_rows``, all over ``num_context`` positions. Its time is close to linear in these on a CPU
and on a GPU that is short of compute, and flat on a GPU that is short of bandwidth, so the line is
drawn through steps of about as many requests. Nothing here knows a machine, and a step that another
process holds up does not count: of each kind of step the lower median of a few is taken. A machine
that others share slows down and recovers by half within seconds, and all kinds of steps with it;
the kinds are measured at different times, so each is kept as what it takes at one pace of the
machine.

    pytest tests/unit/test_adaptive.py
"""

import math
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_LAST = 25
"""Steps of a kind that are kept."""
_PACE = 7
"""Steps whose median is the pace."""
_FEWEST_FOR_PACE = 3
"""Steps of a kind, before a further one tells of the pace."""
_FADE = 0.999
"""Weight that a kind of step keeps with each step of another kind: a machine that slows down is
followed."""
STALE = 128
"""Steps after which what was measured of a kind is forgotten once it is measured again."""
_CURVE = 0.1
"""How far from the line, as a share of it, a kind's cost is expected to be: a kind's own steps
count for as much as they tell it more exactly, for the luckiest of a few noisy measurements would
be chosen for its luck."""
_NOISE = 0.08, 1 / 32
"""How far a step is from what its kind takes, as a share of that, before any was seen; and the
weight of each that is."""
_FEWEST_PLAIN = 2
"""Steps without drafts of about as many requests, before their cost counts as known."""
_NEARNESS = 1.5
"""How fast the weight of a kind falls with the distance of its batch size, in powers of two."""


def power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm: so many requests are about as many."""
    return round(math.log2(num_reqs))


@dataclass(frozen=True)
class Work:
    """What one step computes."""

    num_reqs: int
    num_tokens: int
    """The target's rows: one a request and one for each draft token that is verified."""
    draft_rows: int
    """The drafter's rows, K + 1 a request; 0 where nothing is drafted."""
    num_context: int = 0
    """Positions of all requests' contexts, which the rows attend to."""

    @property
    def features(self) -> tuple[float, ...]:
        """Constant, requests, verified draft tokens, drafter on, its rows, context."""
        return (
            1.0,
            self.num_reqs,
            self.num_tokens - self.num_reqs,
            float(self.draft_rows > 0),
            self.draft_rows,
            self.num_context,
        )

    @property
    def kind(self) -> tuple[int, int, int]:
        """Steps that are alike: the nearest power of two of the requests, and for each the
        drafter's rows and verified tokens."""
        verified = self.num_tokens - self.num_reqs
        return (
            power(self.num_reqs),
            self.draft_rows // self.num_reqs,
            round(verified / self.num_reqs),
        )


@dataclass
class _Kind:
    work: deque[Work] = field(default_factory=lambda: deque(maxlen=_LAST))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    last_seen: int = 0
    typical: tuple[Work, float] = (Work(1, 1, 0), 0.0)
    """Of the kept steps the one of the lower median, and its seconds at a pace of 1."""

    def add(self, work: Work, seconds: float) -> None:
        self.work.append(work)
        self.seconds.append(seconds)
        count = len(self.seconds)
        # Of an even number the first is left out, for the lower one of two in the middle would be
        # too low.
        order = sorted(
            range(int(count > 2 and count % 2 == 0), count), key=self.seconds.__getitem__
        )
        middle = order[(len(order) - 1) // 2]
        self.typical = self.work[middle], self.seconds[middle]

    def keep_typical(self) -> None:
        """Forgets all other steps."""
        self.work.clear()
        self.seconds.clear()
        self.add(*self.typical)


@dataclass(frozen=True)
class LocalCost:
    """Cost of steps about as large as one of so many requests."""

    weights: Sequence[float]
    """[6]: seconds for each of ``Work.features``; none below zero."""
    factors: dict[tuple[int, int, int], float]
    """By kind of step, measured over linear, closer to one the less it was measured."""

    def seconds(self, work: Work) -> float:
        """Expected seconds of a step."""
        linear = _dot(self.weights, work.features)
        return max(linear * self.factors.get(work.kind, 1.0), 1e-9)


class StepCost:
    """Keeps the last steps of each kind and draws lines through them."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int, int], _Kind] = {}
        self._steps = 0
        self._paces: deque[float] = deque(maxlen=_PACE)
        self._line = [0.0] * len(Work(1, 1, 0).features)
        """The last one that was drawn."""
        self._noise = _NOISE[0]
        """Mean distance of a step from what its kind takes, as a share of that."""
        self._met: set[int] = set()
        """Numbers of rows that there were before, the drafter's below 0: kernels are made for a
        number when it first comes."""

    @property
    def pace(self) -> float:
        """What the last steps took, over what steps of their kinds take."""
        return sorted(self._paces)[len(self._paces) // 2] if self._paces else 1.0

    def observe(self, work: Work, seconds: float) -> None:
        """Takes in a measured step."""
        key, rows = work.kind, {work.num_tokens, -work.draft_rows}
        kind = self._kinds.get(key)
        is_new = not rows <= self._met
        self._met |= rows
        if kind is None:
            if is_new:
                return
            kind = self._kinds[key] = _Kind()
        if kind.seconds and self._steps - kind.last_seen > STALE:
            kind.keep_typical()
        if len(kind.seconds) >= _FEWEST_FOR_PACE:
            pace, usual = self.pace, self._expected(kind, work)
            self._paces.append(seconds / usual)
            # A step that was held up tells nothing of the others' noise.
            self._noise += _NOISE[1] * (
                min(abs(math.log(seconds / (usual * pace))), 1.0) - self._noise
            )
        # A kind that sets the pace is not held against itself: it would wander, and the others stay
        # behind.
        if len(kind.seconds) < _LAST or self._steps - kind.last_seen >= _PACE:
            kind.add(work, seconds / self.pace)
        self._steps += 1
        kind.last_seen = self._steps

    def _expected(self, kind: _Kind, work: Work) -> float:
        """Seconds of a step of a kind at a pace of 1: those of its typical one, and what the line
        gives to the difference between the two."""
        typical, seconds = kind.typical
        theirs = _dot(self._line, typical.features)
        return seconds * _dot(self._line, work.features) / theirs if theirs > 0 else seconds

    def has_seen(self, num_reqs: int) -> bool:
        """Whether steps with drafts were seen at about as many requests, and enough without."""
        size = power(num_reqs)
        drafting = any(rows for each, rows, _ in self._kinds if each == size)
        # None that verifies what was drafted before it: what drafting is held against has to be
        # known for sure.
        plain = self._kinds.get((size, 0, 0))
        return drafting and plain is not None and len(plain.seconds) >= _FEWEST_PLAIN

    def has_both(self, num_reqs: int) -> bool:
        """Whether any steps with the drafter and without were seen at about as many requests."""
        size = power(num_reqs)
        return len({rows > 0 for each, rows, _ in self._kinds if each == size}) == 2

    def near(self, num_reqs: int) -> LocalCost:
        """The cost of steps of about ``num_reqs`` requests: least squares of relative errors,
        weighted by nearness and age."""
        size, weights = math.log2(num_reqs), []
        for (theirs, _, _), kind in self._kinds.items():
            age, distance = self._steps - kind.last_seen, theirs - size
            weights.append(
                len(kind.seconds) * _FADE**age * math.exp(-_NEARNESS * distance * distance) + 1e-6
            )
        rows = np.array(
            [(*kind.typical[0].features, kind.typical[1]) for kind in self._kinds.values()]
        )
        found = _fit(rows, np.array(weights))
        self._line = found.tolist()
        over = (rows[:, -1] / np.maximum(rows[:, :-1] @ found, 1e-9)).tolist()
        doubt, factors = (self._noise / _CURVE) ** 2, {}
        for (key, kind), factor in zip(self._kinds.items(), over, strict=True):
            count = len(kind.seconds)
            factors[key] = factor ** (count / (count + doubt))
        return LocalCost((found * self.pace).tolist(), factors)


def _dot(weights: Sequence[float], features: Sequence[float]) -> float:
    # A handful of numbers: an array of them would cost more than the product.
    return sum(map(operator.mul, weights, features))


def _fit(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of the features that are not negative, for rows of features and seconds; a negative
    one is left out in turn."""
    seconds = rows[:, -1]
    x, scale = rows[:, :-1] / seconds[:, None], np.sqrt(weights)
    kept = list(range(x.shape[1]))
    found = np.zeros(x.shape[1])
    while kept:
        a = x[:, kept] * scale[:, None]
        # In proportion to each feature's own weight: features that go together share what they
        # cost.
        ridge = np.diag(1e-4 * (a * a).sum(axis=0) + 1e-12)
        solved = np.linalg.solve(a.T @ a + ridge, a.T @ scale)
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return found

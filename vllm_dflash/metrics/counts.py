"""What recorders count in: plain integers and lists, which cost a step next to nothing. Pure.

pytest tests/unit/test_metrics.py
"""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts by bucket, the last one for everything above, and the sum of what was observed."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def sample(self) -> list[object]:
        """Counts by bucket and the sum, for a snapshot."""
        return [list(self.counts), self.sum]


class Positions:
    """Counts of draft tokens by position: only the ends are counted as they come, the rest follows from them."""

    def __init__(self, positions: int = 0) -> None:
        """``positions``: those that have a count, of zero, before a draft reached them."""
        self._ends = [0] * (positions + 1)

    def add(self, length: int, times: int = 1) -> None:
        """``times`` drafts that had, or got right, their first ``length`` tokens."""
        if length >= len(self._ends):
            self._ends += [0] * (length + 1 - len(self._ends))
        self._ends[length] += times

    def samples(self) -> list[tuple[list[str], int]]:
        """By position from 1 on, how many drafts reached as far."""
        left, found = sum(self._ends), []
        for length, count in enumerate(self._ends[:-1]):
            left -= count
            found.append(([str(length + 1)], left))
        return found


class Speedup:
    """Time of decoding steps against what plain decoding would have taken for the same tokens."""

    FADE = 0.999
    """Weight that what was seen keeps with each step, for ``recent``."""

    def __init__(self) -> None:
        self.baseline = self.measured = 0.0
        self._recent_baseline = self._recent_measured = 0.0

    def observe(self, num_reqs: int, committed: int, seconds: float, plain_seconds: float) -> None:
        """A step that committed so many tokens for ``num_reqs`` requests; a plain one of as many would take ``plain_seconds``."""
        would = committed / num_reqs * plain_seconds
        self.baseline += would
        self.measured += seconds
        self._recent_baseline = self._recent_baseline * self.FADE + would
        self._recent_measured = self._recent_measured * self.FADE + seconds

    @property
    def recent(self) -> float | None:
        """None before anything was measured."""
        return self._recent_baseline / self._recent_measured if self._recent_measured else None

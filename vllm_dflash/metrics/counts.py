"""What recorders count in: plain integers and lists, which cost a step next to nothing. Pure.

pytest tests/unit/test_metrics.py
"""

from bisect import bisect_left
from collections.abc import Sequence

from vllm_dflash.acceptance import Positions


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


def by_position(positions: Positions) -> list[tuple[list[str], int]]:
    """Counts by position, from 1 on, for a snapshot."""
    return [([str(position)], count) for position, count in enumerate(positions.counts, 1)]


class Speedup:
    """Time of decoding steps against what plain decoding would have taken for the same tokens."""

    FADE = 0.999
    """Weight that what was seen keeps with each step, for ``recent``."""

    def __init__(self) -> None:
        self.baseline = self.measured = 0.0
        self._recent_baseline = self._recent_measured = 0.0

    def observe(self, num_reqs: int, committed: int, seconds: float, plain_seconds: float) -> None:
        """A step that committed so many tokens for ``num_reqs`` requests; a plain one of as many
        would take ``plain_seconds``."""
        would = committed / num_reqs * plain_seconds
        self.baseline += would
        self.measured += seconds
        self._recent_baseline = self._recent_baseline * self.FADE + would
        self._recent_measured = self._recent_measured * self.FADE + seconds

    @property
    def recent(self) -> float | None:
        """None before anything was measured."""
        return self._recent_baseline / self._recent_measured if self._recent_measured else None

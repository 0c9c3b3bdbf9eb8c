"""What share of a loss came back, with its 95 % interval.

tau is a ratio over prompts; the parts that the prompts have in its deviation give variances and
covariances (Cochran, Sampling Techniques, 1977, section 6.14). The share is a ratio of two such
differences, gain / lost, and its interval is Fieller's: all s for which gain - s * lost is not told
from 0. It is bounded only where what was lost is told from 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dflash.follow.interval import students_t

Counts = Sequence[Sequence[int]]
"""Of each prompt: drafts, and their accepted tokens."""


@dataclass(frozen=True)
class Share:
    """Of ``lost``, how much a gain brought back."""

    lost: float
    lost_half: float
    """Half of its interval."""
    back: float | None
    """None, as its bounds, where nothing was lost that is told from 0."""
    low: float | None
    high: float | None


def tau_of(counts: Counts) -> float:
    return 1 + sum(c[1] for c in counts) / sum(c[0] for c in counts)


def share(before: Counts, after: Counts, new: Counts, *, paired: bool) -> Share:
    """Of what ``before`` is above ``after``, the share that ``new`` is above it.

    Args:
        before: over the same prompts as the two others where ``paired``, else over others.
    """
    lost, gain = tau_of(before) - tau_of(after), tau_of(new) - tau_of(after)
    high, low, now = (_parts(each) for each in (before, after, new))
    gains = [b - a for a, b in zip(low, now, strict=True)]
    if paired:
        losses = [b - a for a, b in zip(low, high, strict=True)]
        of_lost, of_both, count = _covariance(losses, losses), _covariance(gains, losses), len(low)
    else:
        of_lost = _covariance(high, high) + _covariance(low, low)
        of_both, count = -_covariance(gains, low), min(len(low), len(high))
    t = students_t(count - 1)
    found = [lost, t * math.sqrt(of_lost)]
    a = lost**2 - t**2 * of_lost
    if lost <= 0 or a <= 0:
        return Share(*found, None, None, None)
    b = gain * lost - t**2 * of_both
    c = gain**2 - t**2 * _covariance(gains, gains)
    root = math.sqrt(max(0.0, b**2 - a * c))
    return Share(*found, gain / lost, (b - root) / a, (b + root) / a)


def _parts(counts: Counts) -> list[float]:
    """Each prompt's part in the deviation of tau, whose sum is 0."""
    rate, drafts = tau_of(counts) - 1, sum(c[0] for c in counts) / len(counts)
    return [(accepted - rate * made) / drafts for made, accepted in counts]


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two means over prompts, from their parts."""
    n = len(first)
    return sum(a * b for a, b in zip(first, second, strict=True)) / (n - 1) / n

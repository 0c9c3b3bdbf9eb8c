"""Whether one drafter is better than another on the same prompts, and by how much at least. Pure.

tau is 1 + accepted / drafts over all prompts. The difference of two such ratios over the same
prompts varies by the prompts: its variance is that of their linear parts, prompt by prompt
(Cochran, Sampling Techniques, 1977, section 6.14), with Student's t for few of them.

    pytest tests/unit/test_follow_interval.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from vllm_dflash.acceptance import tau

Counts = Sequence[int]
"""Of one prompt: drafts, and their accepted tokens."""
_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two drafters over the same prompts."""

    old: float
    """tau."""
    new: float
    half: float
    """Half the width of the 95 % interval of ``gain``; infinite for fewer than two prompts."""
    prompts: int

    @property
    def gain(self) -> float:
        return self.new - self.old

    @property
    def is_better(self) -> bool:
        """Whether the new one is better by more than its interval."""
        return self.gain - self.half > 0

    def __str__(self) -> str:
        low, high = self.gain - self.half, self.gain + self.half
        return (
            f"tau {self.old:.2f} -> {self.new:.2f} on {self.prompts} held-out prompts"
            f" ({self.gain:+.2f}, 95 % interval {low:+.2f} to {high:+.2f})"
        )


def compare(old: Sequence[Counts], new: Sequence[Counts]) -> Comparison:
    """``old`` and ``new`` over the same prompts, in one order.

    Raises:
        ValueError: they are not as many, or none has a draft.
    """
    if len(old) != len(new):
        raise ValueError(f"{len(old)} prompts against {len(new)}")
    taus = [tau(sum(c[1] for c in each), sum(c[0] for c in each)) for each in (old, new)]
    if taus[0] is None or taus[1] is None:
        raise ValueError("nothing was drafted")
    parts = [b - a for a, b in zip(_parts(old, taus[0]), _parts(new, taus[1]), strict=True)]
    return Comparison(taus[0], taus[1], _half(parts), len(old))


def _parts(counts: Sequence[Counts], mean: float) -> list[float]:
    """Each prompt's part in the deviation of tau, whose sum is 0."""
    drafts = sum(count[0] for count in counts) / len(counts)
    return [(accepted - (mean - 1) * made) / drafts for made, accepted in counts]


def _half(parts: Sequence[float]) -> float:
    """Half of the interval of their mean."""
    count = len(parts)
    if count < 2:
        return math.inf
    variance = sum(part**2 for part in parts) / (count - 1)
    return students_t(count - 1) * math.sqrt(variance / count)


def students_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by the expansion in 1 / ``freedom`` (Abramowitz and
    Stegun, 26.7.5): exact to 1 % from 4 on, too small below, where it is 12.71, 4.30 and 3.18."""
    known = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in known:
        return known[freedom]
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3

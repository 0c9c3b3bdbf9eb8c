"""What a step takes now: the profile of the warm-up, at the machine's pace. Pure.

A machine that others share slows down and recovers by half within seconds: the pace is the median
of the last steps over what is known of them. What the drafter takes beside the profile is known by
the number of requests, up to the nearest power of two: a median of measurements of steps that draft
beside some that do not, and the other way about, so that a step that was held up does not count.

    pytest tests/unit/test_adaptive.py
"""

import time
from collections import deque
from statistics import median_low

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import GUESS, Profile, power
from vllm_dflash.steps import Work


class StepCost:
    """Seconds of steps, by a profile and by what was measured since."""

    def __init__(self, profile: Profile, tuning: Tuning) -> None:
        self._profile = profile
        self._trust = 0 if profile is GUESS else tuning.trust
        self._window: deque[tuple[int, float, float, float]] = deque(maxlen=tuning.window)
        """Of the last steps: size, seconds, and what the profile says of target and drafter."""
        self._factors: dict[int, deque[float]] = {}
        """By size: what the drafter took over the profile."""
        self.measured: dict[tuple[int, bool], float] = {}
        """When steps of a size that draft, or do not, were last measured, on ``time.monotonic``'s
        clock."""

    def observe(self, work: Work, seconds: float) -> None:
        """Takes in a measured step."""
        (target, draft), last, size = self._profile.parts(work), self._window, power(work.num_reqs)
        last.append((size, max(seconds, 1e-9), target, draft))
        self.measured[size, draft > 0] = time.monotonic()
        if len(last) > 1 and (last[-2][3] > 0) != (draft > 0):
            pace = median_low(s / t for _, s, t, d in last if not d)
            size = next(n for n, _, _, d in reversed(last) if d)
            over = median_low(max(s / pace - t, 0) / d for n, s, t, d in last if d and n == size)
            # One measurement does not stand against a profile, against a guess it does.
            believed = [self._factor(size)] * self._trust
            self._factors.setdefault(size, deque(believed, last.maxlen)).append(over)

    def scales(self, num_reqs: int) -> tuple[float, float]:
        """What the target and the drafter take now over the profile, in steps of so many
        requests."""
        factors = {n: self._factor(n) for n in {size for size, *_ in self._window}}
        pace = median_low([s / (t + factors[n] * d) for n, s, t, d in self._window] or [1.0])
        return pace, pace * self._factor(power(num_reqs))

    def seconds(self, work: Work) -> float:
        """Expected seconds of a step."""
        (target, draft), (pace, slower) = self._profile.parts(work), self.scales(work.num_reqs)
        return pace * target + slower * draft

    def plain_seconds(self, num_reqs: int, num_context: int) -> float | None:
        """Seconds of a step without drafts; None where only guesses are known."""
        if self._profile is GUESS and (power(num_reqs), False) not in self.measured:
            return None
        return self.seconds(Work(num_reqs, num_reqs, 0, num_context, num_context))

    def _factor(self, size: int) -> float:
        """Of this size, or of the next that was measured."""
        nearest = min(self._factors, key=lambda other: abs(other - size), default=size)
        return median_low(self._factors.get(nearest, [1.0]))

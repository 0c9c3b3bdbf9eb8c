"""What a step takes now: the profile of the warm-up, at the machine's pace. Pure.

A machine that others share slows down and recovers by half within seconds: the pace is the median
of the last steps over what is known of them. What the drafter takes beside the profile is known by
the number of requests, up to the nearest power of two: a median of measurements of steps that draft
beside some that do not, and the other way about, so that a step that was held up does not count.

    pytest tests/unit/test_adaptive.py
"""

import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import GUESS, Profile, Work


class _Seen(NamedTuple):
    """A step, and what the profile says of its parts."""

    size: int
    seconds: float
    target: float
    draft: float


def power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm: so many requests are about as many."""
    return (num_reqs * num_reqs).bit_length() // 2


class StepCost:
    """Seconds of steps, by a profile and by what was measured since."""

    def __init__(self, profile: Profile, tuning: Tuning) -> None:
        self._profile, self._samples = profile, tuning.samples
        self._window: deque[_Seen] = deque(maxlen=tuning.window)
        self._factors: dict[int, deque[float]] = {}
        """By size: what the drafter took over the profile."""
        self.measured: dict[tuple[int, bool], float] = {}
        """When steps of a size that draft, or do not, were last measured, on ``time.monotonic``'s
        clock."""

    def observe(self, work: Work, seconds: float) -> None:
        """Takes in a measured step."""
        step = _Seen(power(work.num_reqs), max(seconds, 1e-9), *self._profile.parts(work))
        window, drafts = self._window, step.draft > 0
        is_change = bool(window) and (window[-1].draft > 0) != drafts
        window.append(step)
        self.measured[step.size, drafts] = time.monotonic()
        if is_change:
            pace = _middle(each.seconds / each.target for each in window if not each.draft)
            size = next(each.size for each in reversed(window) if each.draft)
            believed = [] if self._profile is GUESS else [self._factor(size)] * 2
            known = deque(believed, maxlen=self._samples)
            self._factors.setdefault(size, known).append(
                _middle(
                    max(each.seconds / pace - each.target, 0.0) / each.draft
                    for each in window
                    if each.draft and each.size == size
                )
            )

    def scales(self, num_reqs: int) -> tuple[float, float]:
        """What the target and the drafter take now over the profile, in steps of so many
        requests."""
        paces = [s.seconds / (s.target + self._factor(s.size) * s.draft) for s in self._window]
        pace = _middle(paces or [1.0])
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
        if size not in self._factors:
            size = min(self._factors, key=lambda other: abs(other - size), default=size)
        return _middle(self._factors.get(size, [1.0]))


def _middle(values: Iterable[float]) -> float:
    """The median; of two in the middle the lower one, so that of two measurements the one that was
    held up does not count."""
    found = sorted(values)
    return found[(len(found) - 1) // 2]

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

    def pace(self, extra: float) -> float:
        """The machine's, with the drafter's ``extra``."""
        target, draft = _scales(extra) if self.draft else (1.0, 0.0)
        return self.seconds / (target * self.target + draft * self.draft)

    def extra(self, pace: float) -> float:
        """What it took beside the target's part, over the drafter's; where it took less than the
        target's alone, that over the target's, below zero."""
        rest = self.seconds / pace - self.target
        return rest / (self.draft if rest > 0 else self.target)


def _scales(extra: float) -> tuple[float, float]:
    """What the target and the drafter take over the profile."""
    return 1.0 + min(extra, 0.0), max(extra, 0.0)


def power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm: so many requests are about as many."""
    return (num_reqs * num_reqs).bit_length() // 2


class StepCost:
    """Seconds of steps, by a profile and by what was measured since."""

    def __init__(self, profile: Profile, tuning: Tuning) -> None:
        self._profile, self._tuning = profile, tuning
        self._window: deque[_Seen] = deque(maxlen=tuning.window)
        self._extras: dict[int, deque[float]] = {}
        """By size: measurements of the drafter's extra. What is believed beforehand counts for as
        many as set the pace."""
        self.measured: dict[tuple[int, bool], float] = {}
        """When steps of a size that draft, or do not, were last measured, on ``time.monotonic``'s
        clock."""

    def observe(self, work: Work, seconds: float) -> None:
        """Takes in a measured step."""
        parts = self._profile.parts(work)
        step = _Seen(power(work.num_reqs), max(seconds, 1e-9), *parts)
        is_change = bool(self._window) and (self._window[-1].draft > 0) != (step.draft > 0)
        self._window.append(step)
        self.measured[step.size, step.draft > 0] = time.monotonic()
        if is_change:
            pace = _middle(other.pace(0.0) for other in self._window if not other.draft)
            drafts = [other for other in self._window if other.draft]
            size = drafts[-1].size
            if size not in self._extras:
                self._extras[size] = deque([self._extra(size)] * 2, maxlen=self._tuning.samples)
            self._extras[size].append(
                _middle(other.extra(pace) for other in drafts if other.size == size)
            )

    def scales(self, num_reqs: int, drafts: bool) -> tuple[float, float]:
        """What the target and the drafter take now over the profile, in steps of so many
        requests."""
        paces = [step.pace(self._extra(step.size)) for step in self._window]
        pace, extra = _middle(paces or [1.0]), self._extra(power(num_reqs)) if drafts else 0.0
        target, draft = _scales(extra)
        return pace * target, pace * draft

    def seconds(self, work: Work) -> float:
        """Expected seconds of a step."""
        target, draft = self._profile.parts(work)
        slower, also = self.scales(work.num_reqs, draft > 0)
        return slower * target + also * draft

    def plain_seconds(self, num_reqs: int, num_context: int) -> float | None:
        """Seconds of a step without drafts; None where only guesses are known."""
        if self._profile is GUESS and (power(num_reqs), False) not in self.measured:
            return None
        return self.seconds(Work(num_reqs, num_reqs, 0, num_context, num_context))

    def _extra(self, size: int) -> float:
        """Of this size, or of the next that was measured."""
        if size not in self._extras:
            if not self._extras:
                return 1.0
            size = min(self._extras, key=lambda other: abs(other - size))
        return _middle(self._extras[size])


def _middle(values: Iterable[float]) -> float:
    """The median; of two in the middle the lower one, so that of two measurements the one that was
    held up does not count."""
    found = sorted(values)
    return found[(len(found) - 1) // 2]

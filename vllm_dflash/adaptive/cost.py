"""What a step takes now: the profile of the warm-up, at the machine's pace. Pure.

A machine that others share slows down and recovers by half within seconds, and all kinds of steps
with it: the pace is the median of the last steps over what is known of their kinds. Kinds are steps
that draft and steps that do not, at about as many requests. What a kind takes beside the profile is
measured against the others' pace, in the first steps after a change; a median again, so a step that
was held up does not count.

    pytest tests/unit/test_adaptive.py
"""

import math
import time
from collections import deque
from collections.abc import Iterable

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import GUESS, Profile, Work

_Kind = tuple[int, bool]
"""The nearest power of two of the requests, and whether steps draft."""


def power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm: so many requests are about as many."""
    return (num_reqs * num_reqs).bit_length() // 2


class StepCost:
    """Seconds of steps, by a profile and by what was measured since."""

    def __init__(self, profile: Profile, tuning: Tuning) -> None:
        self._profile, self._tuning = profile, tuning
        self._paces: deque[tuple[_Kind, float]] = deque(maxlen=tuning.window)
        """Of the last steps: logarithms of what they took over what is known of their kinds."""
        self._over: dict[_Kind, deque[float]] = {}
        """Of each kind's measurements: logarithms of what a step took over the profile, at a pace
        of 1."""
        self.measured: dict[_Kind, float] = {}
        """When a kind was last measured, on ``time.monotonic``'s clock."""

    def observe(self, work: Work, seconds: float) -> None:
        """Takes in a measured step."""
        kind, tuning = (power(work.num_reqs), work.draft_rows > 0), self._tuning
        over = math.log(max(seconds, 1e-9) / self._profile.of(work))
        # A kind that sets the pace itself tells nothing of what it takes beside the others.
        others = [pace for other, pace in self._paces if other != kind]
        if 2 * len(others) > tuning.window:
            known = self._over.setdefault(kind, deque([self._factor(kind)], maxlen=tuning.samples))
            known.append(over - _middle(others))
        self._paces.append((kind, over - self._factor(kind)))
        self.measured[kind] = time.monotonic()

    def factor(self, num_reqs: int, drafts: bool) -> float:
        """What steps of so many requests take now, over the profile."""
        pace = _middle(pace for _, pace in self._paces) if self._paces else 0.0
        return math.exp(self._factor((power(num_reqs), drafts)) + pace)

    def seconds(self, work: Work) -> float:
        """Expected seconds of a step."""
        return self._profile.of(work) * self.factor(work.num_reqs, work.draft_rows > 0)

    def plain_seconds(self, num_reqs: int, num_context: int) -> float | None:
        """Seconds of a step without drafts; None where only guesses are known."""
        if self._profile is GUESS and (power(num_reqs), False) not in self.measured:
            return None
        return self.seconds(Work(num_reqs, num_reqs, 0, num_context, num_context))

    def _factor(self, kind: _Kind) -> float:
        """Its own, or that of the next number of requests that was measured."""
        if kind not in self._over:
            known = [other for other in self._over if other[1] == kind[1]]
            if not known:
                return 0.0
            kind = min(known, key=lambda other: abs(other[0] - kind[0]))
        return _middle(self._over[kind])


def _middle(values: Iterable[float]) -> float:
    """The median; of two in the middle the lower one, so that of two measurements the one that was
    held up does not count."""
    found = sorted(values)
    return found[(len(found) - 1) // 2]

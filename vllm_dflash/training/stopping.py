"""When a training ends before its last step: its minutes are over, or its user stops it. Pure.

pytest tests/unit/test_train_stopping.py
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOOKS = 16
"""Parts of the minutes, after each of which the steps that fit are counted anew."""


class OverError(Exception):
    """A measurement is broken off, as there is no time for it any more."""


class Stopping:
    """Of one training.

    Args:
        minutes: that it may take, with all that it measures on its way; None: as many as it takes.
        spent: seconds of it so far.
    """

    def __init__(self, minutes: float | None, spent: Callable[[], float]) -> None:
        self._seconds, self._spent = None if minutes is None else 60 * minutes, spent
        self._at: tuple[int, float] | None = None
        self.interrupted = False
        """Whether the user asked for the end, with Ctrl-C."""

    def steps(self, done: int, now: int, most: int) -> int:
        """How many steps there are to be in all, of ``most``, after ``done`` of them; ``now``: how
        many there were to be so far. A machine that has become slower does fewer."""
        if self._seconds is None:
            return now
        spent = self._spent()
        if spent >= self._seconds:
            return max(1, done)
        if self._at is None:
            self._at = done, spent
            return now
        began, before = self._at
        if spent - before < self._seconds / _LOOKS or done == began:
            return now
        self._at = done, spent
        pace = (spent - before) / (done - began)
        return min(most, done + max(1, int((self._seconds - spent) / pace)))

    def look(self) -> None:
        """Called by a measurement after each of its parts.

        Raises:
            OverError: it is to end here.
        """
        is_over = self._seconds is not None and self._spent() >= self._seconds
        if self.interrupted or is_over:
            raise OverError

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, the first Ctrl-C is noted, so that a step is whole; a second one ends it at
        once. Only where Python's own answer to it is in force."""
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        ):
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.interrupted:
                signal.default_int_handler(number, frame)
            self.interrupted = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

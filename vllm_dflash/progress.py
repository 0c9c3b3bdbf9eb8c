"""Progress of long work: a bar on a terminal; elsewhere a line every half minute, and none for work
that is shorter.

pytest tests/unit/test_progress.py
"""

import io
import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS = 30.0
"""Between two lines."""


class Progress(tqdm):
    """tqdm's bar, used in the same way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = kwargs.get("file") or sys.stderr
        self._in_lines, self._printed_at = not file.isatty(), time.monotonic()
        self._printed: tuple[Any, ...] = ()
        """Number, description and what stands beside the bar, of the last line."""
        if self._in_lines:
            often = {"mininterval": _SECONDS, "maxinterval": _SECONDS, "delay": _SECONDS}
            kwargs |= often | {"leave": True, "ascii": True}
        super().__init__(*args, **kwargs)
        if not self.disable:
            # tqdm's clock is the machine's, and prints nothing for as long as that was set back.
            self._time = time.monotonic
            self.start_t = self.last_print_t = self._time()

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What prints the bar's text to ``file``."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text, file=file, flush=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Prints the bar, or ``msg`` in its place; as lines, where it is time for one. tqdm asks
        at each change of what stands beside the bar, and for the last state twice."""
        if not self._in_lines:
            return super().display(msg, pos)
        is_closed, now, state = self.disable, time.monotonic(), (self.n, self.desc, self.postfix)
        if (is_closed or now - self._printed_at >= _SECONDS) and state != self._printed:
            self._printed_at, self._printed = now, state
            self.sp(str(self))
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Makes room for another line; nothing has to go where there are only lines."""
        if not self._in_lines:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        """Prints the last state, where any was printed before."""
        if self._in_lines:
            self.fp = io.StringIO()  # tqdm ends a bar with a newline; a line has one
        super().close()

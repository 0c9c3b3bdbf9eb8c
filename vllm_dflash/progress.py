"""Progress of long work: a bar on a terminal; elsewhere a line every half minute, and none for work
that is shorter.

pytest tests/unit/test_progress.py
"""

import io
import sys
from typing import Any

from tqdm import tqdm

_SECONDS = 30.0
"""Between two lines."""


class Progress(tqdm):
    """tqdm's bar, used in the same way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = kwargs.get("file") or sys.stderr
        self._in_lines = not file.isatty()
        if self._in_lines:
            often = {"mininterval": _SECONDS, "maxinterval": _SECONDS, "delay": _SECONDS}
            kwargs |= often | {"leave": True, "ascii": True}
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What prints the bar's text to ``file``."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text, file=file, flush=True)

    def close(self) -> None:
        """Prints the last state, where any was printed before."""
        if self._in_lines:
            self.fp = io.StringIO()  # tqdm ends a bar with a newline; a line has one
        super().close()

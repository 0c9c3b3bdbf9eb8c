"""The files that a recorder writes: lines of one process, bounded in size and, where that is asked
for, in age.

pytest tests/unit/test_train_recorder.py tests/unit/test_follow_recorder.py
"""

import os
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path

from vllm_dflash import contents
from vllm_dflash.log import logger
from vllm_dflash.training import redaction
from vllm_dflash.training.errors import TrainingError

MAX_MB = "VLLM_DFLASH_RECORD_MAX_MB"
MAX_DAYS = "VLLM_DFLASH_RECORD_MAX_DAYS"
REDACT = "VLLM_DFLASH_RECORD_REDACT"
_WAITING_LINES = 256
_FILES = 16
"""Where lines have an age: so many files hold what may be kept, so that one that goes is little."""
_LOOK_S = 60.0
"""Between two looks for lines that are too old, without traffic."""
_DAY_S = 86400.0
_MOST_DAYS = 36500
_FAILS = "lines are left out, as %s fails: %s (its message is not shown: it may hold their text)"


def age_of(text: str | None) -> float | None:
    """Days that lines are kept for; None for ever.

    Raises:
        TrainingError: it is no number above 0.
    """
    if not text:
        return None
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days < _MOST_DAYS:
        raise TrainingError(f"{MAX_DAYS} is {text!r}: give a number of days above 0, such as 7")
    return days


class LineWriter:
    """Appends lines to a file of this process's own, in a thread, until the folder holds ``limit``
    bytes or the disk is full; where lines are kept for ``days``, files take turns, and the oldest
    goes."""

    def __init__(
        self,
        folder: Path,
        limit: int,
        days: float | None = None,
        redact: redaction.Redact | None = None,
    ) -> None:
        self.folder, self.limit, self.stopped = folder, limit, False
        self._seconds, self._redact = None if days is None else days * _DAY_S, redact
        self._target: str | None = None
        self._of = ""
        self._told: set[str] = set()
        self._handle = self._open()
        self._lines: queue.Queue[tuple[str, str | None]] = queue.Queue(_WAITING_LINES)
        threading.Thread(target=self._write, name="traffic recorder", daemon=True).start()

    def _open(self) -> int:
        self.path = self.folder / f"traffic-{os.getpid()}-{os.urandom(3).hex()}{self._of}.jsonl"
        self._began = time.time()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def put(self, line: str, target: str | None = None) -> None:
        """Hands a line over, an answer of ``target``'s, a folder's or hub id; it is dropped where
        the disk is too slow for the traffic."""
        if not self.stopped:
            try:
                self._lines.put_nowait((line, target))
            except queue.Full:
                logger.debug("a line was dropped: the disk is slower than the traffic")

    def drain(self) -> None:
        """Waits until every line that was handed over is dealt with."""
        self._lines.join()

    def _write(self) -> None:
        while True:
            try:
                line, target = self._lines.get(timeout=None if self._seconds is None else _LOOK_S)
            except queue.Empty:
                with suppress(OSError):
                    self._remove_old()
                continue
            try:
                if not self.stopped:
                    self._take(line, target)
            except Exception as error:  # a thread that ends would leave a queue that nobody empties
                self._stop((isinstance(error, OSError) and error.strerror) or type(error).__name__)
            finally:
                self._lines.task_done()

    def _take(self, line: str, target: str | None) -> None:
        redacted = self._redacted(line)
        if redacted is None:
            return
        if target is not None and target != self._target:
            self._target = target
            digest = contents.of_folder(target)
            self._next_file("" if digest is None else f"-{digest}")
        elif self._seconds is not None and self._is_done():
            self._next_file(self._of)
        self._append((redacted + "\n").encode(errors="replace"))

    def _redacted(self, line: str) -> str | None:
        """The line as the user's function leaves it; None where it is to be left out, as it is
        where the function fails."""
        if self._redact is None:
            return line
        try:
            return redaction.apply(self._redact, line)
        except Exception as error:
            # What the function raised may hold the line's text.
            is_ours = isinstance(error, redaction.NoLineError)
            why = str(error) if is_ours else type(error).__name__
            if why not in self._told:
                self._told.add(why)
                said = "lines are left out, as of %s: %s" if is_ours else _FAILS
                logger.error(said, REDACT, why)
            return None

    def _next_file(self, of: str) -> None:
        """Goes on in a new file, whose name ends in ``of``."""
        was_empty = os.fstat(self._handle).st_size == 0
        os.close(self._handle)
        if was_empty:
            self.path.unlink(missing_ok=True)
        self._of = of
        self._handle = self._open()
        if self._seconds is not None:
            self._remove_old()

    def _is_done(self) -> bool:
        """Whether a file has its part of what may be kept, by size or by age."""
        assert self._seconds is not None
        size = os.fstat(self._handle).st_size
        is_old = time.time() - self._began > self._seconds / _FILES
        return size > 0 and (is_old or size > self.limit // _FILES)

    def _remove_old(self) -> None:
        """Removes files whose first line may be older than lines are kept for."""
        if self._seconds is None:
            return
        # A file's last line is at most a part of that time younger than its first.
        oldest = time.time() - self._seconds * (1 - 1 / _FILES)
        for path in self._others():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _others(self) -> list[Path]:
        """The folder's other files, the oldest first."""
        found = []
        for path in self.folder.glob("traffic-*.jsonl"):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(found) if path != self.path]

    def _append(self, raw: bytes) -> None:
        if os.fstat(self._handle).st_nlink == 0:
            # The file has been removed, perhaps with its folder: what is written to it would be on
            # the disk and in no folder.
            os.close(self._handle)
            self._handle = self._open()
        if self._seconds is not None:
            self._make_room(len(raw))
        if self._used() + len(raw) > self.limit:
            self._stop(f"{self.path.parent} has reached {MAX_MB}")
            return
        before = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, raw)
            if written < len(raw):
                os.ftruncate(self._handle, before)
                self._stop("the disk is full")
        except OSError as error:
            os.ftruncate(self._handle, before)
            self._stop(error.strerror or "the disk cannot be written")

    def _make_room(self, size: int) -> None:
        """Removes the oldest files until a line of ``size`` bytes fits."""
        for path in self._others():
            if self._used() + size <= self.limit:
                return
            path.unlink(missing_ok=True)

    def _used(self) -> int:
        """Bytes in the folder, and in this process's own file wherever it has been moved to."""
        own = os.fstat(self._handle)
        used = own.st_size
        for path in self.path.parent.glob("traffic-*.jsonl"):
            with suppress(FileNotFoundError):  # removed meanwhile
                found = path.stat()
                used += (
                    found.st_size if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino) else 0
                )
        return used

    def _stop(self, why: str) -> None:
        self.stopped = True
        logger.warning("recording has ended, serving goes on: %s", why)

"""What the recorders of an engine and of its drafter share: the labels, a lock, and the thread that
writes what was counted.

pytest tests/engine/test_metrics.py
"""

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.util import Finalize
from typing import Any

from vllm_dflash.log import logger
from vllm_dflash.metrics import snapshots

PERIOD = 1.0
"""Seconds between two writes, at least: what /metrics shows is no older."""
Samples = Mapping[str, list[Any]]
"""By a metric's name without prefix and ``_total``, its samples: label values and a number, or
counts by bucket and a sum."""
_recorders: "list[Recorder]" = []


class Recorder:
    """Writes what a method returns to this process's snapshot, where ``dirty`` was set since the
    last time.

    It keeps nothing alive: an engine that is dropped without being shut down loses its series once
    it is collected.
    """

    def __init__(self, role: str, vllm_config: Any, samples: Callable[[], Samples]) -> None:
        self.lock = threading.Lock()
        """Held while something is counted, so that a snapshot is never half a step."""
        self.dirty = True
        self._samples = weakref.WeakMethod(samples)
        engine = str(vllm_config.parallel_config.data_parallel_index)
        folder = snapshots.folder()
        self._file = None if folder is None else folder / snapshots.file_name(role, engine)
        self._labels = [vllm_config.model_config.served_model_name, engine]
        self._stop, self._failing = threading.Event(), False
        snapshots.remove_left_behind()
        self._thread = threading.Thread(target=self._run, name="vllm-dflash metrics", daemon=True)
        self._thread.start()
        _recorders.append(self)
        # Not atexit, which processes that vLLM starts by multiprocessing end without.
        Finalize(None, self.close, exitpriority=10)

    def flush(self) -> None:
        """Writes now; where the disk is full, says so once, keeps counting, and tries again the
        next time."""
        if self._file is None:
            return
        count = self._samples()
        if count is None:
            self.close()
            return
        with self.lock:
            self.dirty, samples = False, count()
        try:
            snapshots.write(self._file, {"labels": self._labels, "samples": samples})
        except OSError as error:
            self.dirty = True
            if not self._failing:
                logger.warning(
                    "metrics of %s are not up to date until it can be written: %s",
                    self._file,
                    error.strerror or error,
                )
            self._failing = True
        else:
            self._failing = False

    def touch(self) -> None:
        """What is counted has changed."""
        self.dirty = True

    def close(self) -> None:
        """Ends the series: an engine that is gone has none."""
        self._stop.set()
        if self._file is not None:
            snapshots.remove(self._file)
        if self in _recorders:
            _recorders.remove(self)

    def _run(self) -> None:
        # By the clock, so that an engine's snapshot and its drafter's are of one moment, and the
        # one's seconds never exceed the other's for long.
        while not self._stop.wait(PERIOD - time.time() % PERIOD):
            if self.dirty or self._samples() is None:
                self.flush()


def touch_here() -> None:
    """Has what this process's recorders know written anew: it has changed outside of a step."""
    for recorder in list(_recorders):
        recorder.touch()


def flush_here() -> None:
    """Writes what the recorders of this process have counted."""
    for recorder in list(_recorders):
        recorder.flush()

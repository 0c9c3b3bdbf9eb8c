"""The parent's side of a benchmark's engine: a child process, driven by JSON lines, that ends with its parent.

pytest tests/unit/test_bench_process.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vllm_dflash.evaluation.workload import Phase

_LINES_SHOWN = 12
_SECONDS_TO_END = 15.0
_ERRORS = (re.compile(r"^\s*Value error, (?P<said>.*?)(\[type=|$)"), re.compile(r"(?P<said>.*Error\b.*)"))
_CHILD = ("-W", "ignore", "-m", "vllm_dflash.evaluation.engine_child")


class EngineFailedError(RuntimeError):
    """An engine did not start, or died; the message is one line, ``tail`` the end of its log."""

    def __init__(self, reason: str, tail: str = "") -> None:
        super().__init__(reason)
        self.tail = tail


@dataclass(frozen=True)
class Job:
    """Closed loops, one after the other."""

    prompts: Sequence[Sequence[int]]
    """Those of each phase in order."""
    phases: Sequence[Phase]
    max_tokens: Sequence[int]
    """Of each prompt."""
    temperature: float
    slice_seconds: float = 0.0
    """After which the engine pauses, for the others' slices; 0 for never."""

    @property
    def concurrency(self) -> int:
        """The most requests in flight."""
        return max(phase.concurrency for phase in self.phases)


class Engine(Protocol):
    """What a sweep runs its jobs on."""

    def run(self, job: Job, on_request: Callable[[], object]) -> Generator[None, None, dict[str, Any]]:
        """Runs the job a slice at a time, calls ``on_request`` as requests end, and returns what was measured.

        Raises:
            EngineFailedError: it will not run any more.
        """


class EngineProcess:
    """A child with one engine, in a process group of its own: Ctrl-C reaches the parent alone, which then ends all.

    A parent that is killed needs no one to clean up: the child's input ends, and so does the child.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path, command: Sequence[str] = _CHILD) -> None:
        """Starts it and returns at once; ``wait_until_ready`` waits. ``command`` follows the name of the Python that runs this."""
        self._log = log
        # In one process, so that ending it ends all; threads left unbound, for bound engines would all sit on the same cores.
        env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
        reading, writing = os.pipe()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command, str(writing)], env=env, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                text=True, pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        self._answers = os.fdopen(reading)
        self._send(settings)

    def wait_until_ready(self) -> dict[str, Any]:
        """What the engine says of itself.

        Raises:
            EngineFailedError: it did not start.
        """
        return self._receive()["ready"]

    def run(self, job: Job, on_request: Callable[[], object]) -> Generator[None, None, dict[str, Any]]:
        """See ``Engine``."""
        self._send(asdict(job))
        while True:
            message = self._receive()
            if "result" in message:
                return message["result"]
            if "paused" in message:
                yield
                self._send({})
            else:
                on_request()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(at_once=kind is not None)

    def close(self, *, at_once: bool = False) -> None:
        """Ends the child and all that it started; waits for it to end by itself unless ``at_once``."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
        except OSError:  # unsent bytes for a child that is gone
            pass
        try:
            self._process.wait(0 if at_once else _SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answers.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure() from None

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith("\n"):
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> EngineFailedError:
        try:
            status = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.close(at_once=True)
            status = self._process.returncode
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = _what_was_said(lines)
        ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return EngineFailedError(f"ended with {ended}: {said}", "\n".join(lines[-_LINES_SHOWN:]))


def _what_was_said(lines: Sequence[str]) -> str:
    """The line of a log that a user can act on: of a refused configuration what vLLM's validator quotes, else the last error's."""
    for form in _ERRORS:
        found = next((match for line in reversed(lines) if (match := form.search(line))), None)
        if found is not None:
            return found["said"].strip()
    return lines[-1].strip() if lines else "it said nothing"

"""The parent's side of an engine's process: a child, driven by JSON lines, that ends with its
parent.

pytest tests/unit/test_engine_process.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_dflash.files import create

DEFAULT_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Where the environment has no such value: threads are left unbound, for bound engines would all
sit on the same cores."""
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""In one process, so that ending it ends all."""
QUIET = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
"""For an engine of whose output a user reads the end where it fails."""
_LINES_SHOWN = 12
_SECONDS_TO_END = 15.0
_ERRORS = (
    re.compile(r"^\s*Value error, (?P<said>.*?)(\[type=|$)"),
    re.compile(r"(?P<said>.*Error\b.*)"),
)


class EngineFailedError(RuntimeError):
    """An engine did not start, or died; the message is one line, ``tail`` the end of its log."""

    def __init__(self, reason: str, tail: str = "") -> None:
        super().__init__(reason)
        self.tail = tail


class EngineRefusedError(RuntimeError):
    """An engine runs, but cannot do the job; the message is the child's own."""


class EngineProcess:
    """A child with one engine, in a process group of its own: Ctrl-C reaches the parent alone,
    which then ends all.

    A parent that is killed needs no one to clean up: the child's input ends, and so does the child.
    """

    def __init__(
        self,
        module: str,
        settings: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts ``python -m module`` and returns at once; ``wait_until_ready`` waits.

        Args:
            module: one that calls ``engines.child.serve``.
            settings: what it is handed first.
            log: the file for all that it prints.
            environment: beside what is set here.
        """
        self._log = log
        env = {**DEFAULT_ENV, **os.environ, **ENV, **(environment or {})}
        reading, writing = os.pipe()
        with create(log) as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._command(module), str(writing)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self._send(settings)

    def wait_until_ready(self) -> Any:
        """What the engine says of itself.

        Raises:
            EngineFailedError: it did not start.
            EngineRefusedError: it cannot do what the settings ask for.
        """
        return self._receive()["ready"]

    def slices(
        self, job: Mapping[str, Any], on_done: Callable[[int], object]
    ) -> Generator[None, None, Any]:
        """Runs a job a slice at a time, where the child pauses; returns its result.

        Args:
            job: what the child's module takes.
            on_done: called with how many more of its parts are done.

        Raises:
            EngineFailedError, EngineRefusedError: it will not run any more; it cannot do this.
        """
        self._send(job)
        while True:
            message = self._receive()
            if "result" in message:
                return message["result"]
            if "paused" in message:
                yield
                self._send({})
            else:
                on_done(message["done"])

    def do(self, job: Mapping[str, Any], on_done: Callable[[int], object] = lambda _: None) -> Any:
        """A whole job's result; see ``slices``."""
        run = self.slices(job, on_done)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(at_once=kind is not None)

    def close(self, *, at_once: bool = False) -> None:
        """Ends the child and all that it started; waits for it to end by itself unless
        ``at_once``."""
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

    @staticmethod
    def _command(module: str) -> Sequence[str]:
        """What follows the name of the Python that runs this."""
        return "-W", "ignore", "-m", module

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
        message: dict[str, Any] = json.loads(line)
        if "refused" in message:
            raise EngineRefusedError(message["refused"])
        return message

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
    """The line of a log that a user can act on: of a refused configuration what vLLM's validator
    quotes, else the last error's."""
    for form in _ERRORS:
        found = next((match for line in reversed(lines) if (match := form.search(line))), None)
        if found is not None:
            return found["said"].strip()
    return lines[-1].strip() if lines else "it said nothing"

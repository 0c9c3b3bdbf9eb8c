"""The driver's end of a ``serving.py`` process: starting it, engine after engine in it, and
starting it again when it ended."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import forks
from engine.harness import engine_env


class Crash(Exception):  # noqa: N818
    """An engine ended, with the end of its log."""


class BothEnded(Crash):
    """So did the engine without a drafter: vLLM's own."""


class Child:
    """One ``serving.py`` process, started again after it ended."""

    def __init__(self, name: str, folder: Path, env: dict[str, str] | None = None) -> None:
        self._results, self._log, self._env = (
            folder / f"{name}.jsonl",
            folder / f"{name}.log",
            env or {},
        )
        self._process: forks.Popen | None = None
        self._started: dict[str, Any] = {}

    def start(self, **engine: Any) -> None:
        """Another engine in place of the one before."""
        self._started = engine
        if self._process is None:
            self._results.write_text("")
            tests = Path(__file__).parents[1]
            script = tests / "fuzzing" / "serving.py"
            paths = [str(tests / "quick_start"), str(tests), str(tests.parent)]
            env = {
                "OMP_NUM_THREADS": "1",
                "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",
                "PYTHONPATH": ":".join(paths),
            }
            with self._log.open("a") as log:
                self._process = forks.Popen(
                    [sys.executable, str(script), str(self._results)],
                    env=engine_env(env | self._env),
                    stdout=log,
                )
            self._reader = self._results.open()
        self.send(do="start", **engine)
        self.read()

    def send(self, **asked: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def read(self, seconds: float = 400) -> dict[str, Any]:
        """The answer to what was sent last. Raises Crash; the engine is then started again at the
        next ``start`` or ``restart``."""
        assert self._process is not None
        text, deadline = "", time.monotonic() + seconds
        while not text.endswith("\n"):
            text += self._reader.readline()
            if not text and (self._process.poll() is not None or time.monotonic() > deadline):
                how = (
                    "hung"
                    if self._process.poll() is None
                    else f"ended with {self._process.returncode}"
                )
                self.end()
                raise Crash(f"the process {how}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0 if text else 0.01)
        answer: dict[str, Any] = json.loads(text)
        if "crash" in answer:
            self.end()
            raise Crash(answer["crash"])
        return answer

    def restart(self) -> None:
        self.end()
        self.start(**self._started)

    def end(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._reader.close()
        self._process = None

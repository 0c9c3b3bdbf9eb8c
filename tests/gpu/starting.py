"""Starts the processes that ``child`` and ``oracle`` run in."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_LOG_SHOWN = 6000
"""Characters of a log's end."""


@dataclass(frozen=True)
class Spec:
    """One engine: its name, the arguments of its ``LLM``, and what is set in its environment."""

    name: str
    args: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    script: str = "child.py"


def start_engine(spec: Spec, log: Path, *, tiny: bool) -> Any:
    """An ``EngineProcess`` that runs a script of this folder; it returns at once."""
    from vllm_dflash.engines.process import EngineProcess

    class Engine(EngineProcess):
        @staticmethod
        def _command(module: str) -> Sequence[str]:
            return "-W", "ignore", str(HERE / module)

        def kill(self) -> None:
            """From any thread: whoever waits for an answer is told that there is none."""
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    settings = {"engine_args": dict(spec.args), "interpreted": tiny}
    return Engine(spec.script, settings, log, spec.environment)


class Engines:
    """Those that were started together, by name; a job for one that did not start says why."""

    def __init__(self, found: Mapping[str, Any], logs: Mapping[str, Path]) -> None:
        self._found, self._logs = found, logs

    def do(self, name: str, job: Mapping[str, Any]) -> Any:
        """A job's result.

        Raises:
            EngineFailedError, EngineRefusedError: the engine did not start or died; cannot do it.
        """
        engine = self._found[name]
        try:
            if isinstance(engine, Exception):
                raise engine
            found = engine.do(job)
        except Exception as error:
            self._add_log(name, error)
            raise
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _add_log(self, name: str, error: Exception) -> None:
        """What it printed last: a traceback is longer than what ``EngineProcess`` keeps."""
        log = self._logs.get(name)
        if log is not None and log.is_file() and not hasattr(error, "__notes__"):
            error.add_note(log.read_text(errors="replace")[-_LOG_SHOWN:])

"""Starts the processes that ``child`` and ``oracle`` run in."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_AT_ONCE, _AT_ONCE_TINY = 4, 2
"""Engines that start side by side."""
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


class Starter:
    """Starts a program's engines, and ends them, from another thread too."""

    def __init__(self, *, tiny: bool) -> None:
        self.is_over, self._tiny = False, tiny
        self._running: list[Any] = []

    @contextmanager
    def started(
        self,
        specs: Sequence[Spec],
        logs: Path,
        on_ready: Callable[[str, Any], object],
        *,
        gently: bool,
    ) -> Iterator[Engines]:
        """Engines that run within.

        Args:
            logs: the folder of what they print.
            on_ready: called with an engine's name and what it says of itself, or the error that
                it ended with.
            gently: they end by themselves, with what they have to put away.
        """
        logs.mkdir(parents=True, exist_ok=True)
        paths = {spec.name: logs / f"{spec.name.replace(' ', '-')}.log" for spec in specs}
        found: dict[str, Any] = {}
        begun: list[tuple[str, Any]] = []

        def wait() -> None:
            name, engine = begun.pop(0)
            try:
                ready, found[name] = engine.wait_until_ready(), engine
            except Exception as error:
                ready = found[name] = error
            if not (self.is_over and isinstance(ready, Exception)):
                on_ready(name, ready)

        with ExitStack() as stack:
            for spec in specs:
                engine = start_engine(spec, paths[spec.name], tiny=self._tiny)
                self._running.append(stack.enter_context(engine))
                if self.is_over:  # since before it was in the list
                    engine.kill()
                begun.append((spec.name, engine))
                if len(begun) == (_AT_ONCE_TINY if self._tiny else _AT_ONCE):
                    wait()
            while begun:
                wait()
            try:
                yield Engines(found, paths)
            finally:
                if not gently:
                    self._kill_all()
                self._running = []

    def end(self) -> None:
        """The time is over: whoever waits for an engine is told that there is none."""
        self.is_over = True
        self._kill_all()

    def _kill_all(self) -> None:
        for engine in list(self._running):
            engine.kill()

"""``vllm-dflash bench``: methods on the same prompts, in one run, taking turns; figures with their
spread, and a report.

    vllm-dflash bench --methods plain,dflash:7,native:7,ngram --concurrency 1,8

Limits: one machine; every method's engine is in memory all the time; offline, so without
tokenizing, HTTP and streaming (``--server``
measures with them). Tests: ``pytest tests/unit/test_bench*.py tests/engine/test_bench.py``.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_dflash.api_keys import masked, without_secrets
from vllm_dflash.engines.process import EngineFailedError
from vllm_dflash.evaluation.job import Engine
from vllm_dflash.evaluation.machine import machine, versions
from vllm_dflash.evaluation.methods import KINDS, Method, UsageError
from vllm_dflash.evaluation.plan import Plan, make_plan
from vllm_dflash.evaluation.report import short_lines, write
from vllm_dflash.evaluation.starting import start_engines
from vllm_dflash.evaluation.summary import rows
from vllm_dflash.evaluation.sweep import Record, Sweep
from vllm_dflash.prompts import PromptError

_INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """The command: 0 where a report was written, 1 where no method ran, 2 on wrong usage, 130 where
    it was interrupted."""
    try:
        plan = make_plan(args)
        out = _new_folder(args.out)
    except (UsageError, PromptError) as error:
        print(f"vllm-dflash bench: {error}", file=sys.stderr)
        return 2
    bench = Bench(plan, [Path(sys.argv[0]).name, *masked(sys.argv[1:])], out)
    try:
        bench.run()
    except UnwritableError as error:
        print(f"vllm-dflash bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        bench.write()
        print(f"\ninterrupted; what was measured is in {out}", file=sys.stderr)
        return _INTERRUPTED
    print(
        "\n".join(
            [
                *short_lines(bench.results()),
                "",
                f"report: {out / 'report.html'}, report.md, results.json",
            ]
        )
    )
    return 0 if bench.record.runs else 1


class UnwritableError(RuntimeError):
    """The report cannot be written; the message says what to do."""


def _new_folder(path: Path | None) -> Path:
    folder = path or Path(datetime.now().strftime("bench-%Y%m%d-%H%M%S"))
    try:
        if os.path.lexists(folder / "results.json"):
            raise UsageError(
                f"--out {folder} holds the results of another run: give a folder that does not"
            )
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be made or written ({error}): give a folder that can be"
        ) from None
    return folder


class Bench:
    """One run, and the state of its results at any time."""

    def __init__(self, plan: Plan, command: Sequence[str], out: Path) -> None:
        self.record = Record()
        self._plan, self._command, self._out = plan, command, out
        self._began, self._clock = datetime.now(UTC), time.monotonic()
        self._engines: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, EngineFailedError] = {}
        self._repeats_done = 0

    def run(self) -> None:
        """Runs the sweep, on engines that are started once or anew for each repeat."""
        plan = self._plan
        sweep = Sweep(
            plan.points, [plan.requests(point) for point in plan.points], plan.slice_seconds
        )
        self.record, repeats = sweep.record, range(1, plan.repeats + 1)
        for each in [[repeat] for repeat in repeats] if plan.fresh_engines else [list(repeats)]:
            with ExitStack() as stack:
                engines: Mapping[str, Engine] = start_engines(
                    plan, self._out / "logs", stack, self._engines, self._failures
                )
                if engines:
                    sweep.run(engines, each, self._after_repeat)
        self.write()

    def write(self) -> None:
        """Writes all files as of now.

        Raises:
            UnwritableError: the disk is full, or something is in their place.
        """
        try:
            write(self.results(), self._out)
        except OSError as error:
            raise UnwritableError(
                f"the report in {self._out} cannot be written ({error}): free some space, remove"
                " what is in its place, or give another --out; what was written after an earlier"
                " repeat is kept"
            ) from None

    def _after_repeat(self, repeat: int) -> None:
        self._repeats_done = repeat
        self.write()

    def results(self) -> dict[str, Any]:
        """All that is known, as results.json has it."""
        plan = self._plan
        # `auto` is what the target's config says, which the engines know.
        dtype = next(
            (engine["dtype"] for engine in self._engines.values() if "dtype" in engine), None
        )
        return {
            "format": 1,
            "complete": self._repeats_done == plan.repeats or not self._engines,
            "repeats_done": self._repeats_done,
            "began": self._began.isoformat(timespec="seconds"),
            "seconds": time.monotonic() - self._clock,
            "command": list(self._command),
            "versions": versions(),
            "machine": machine(),
            "settings": without_secrets(plan.settings | ({"dtype": dtype} if dtype else {})),
            "methods": [self._method(method) for method in plan.methods],
            "points": [asdict(point) for point in plan.points],
            "rows": rows(self.record, len(plan.points), plan.methods),
            "runs": self.record.runs,
        }

    def _method(self, method: Method) -> dict[str, Any]:
        failure = self._failures.get(method.name) or self.record.failures.get(method.name)
        ran = any(run["method"] == method.name for run in self.record.runs)
        state = "ran" if failure is None else "ended early" if ran else "did not run"
        return {
            "name": method.name,
            "kind": method.kind,
            "what": KINDS.get(method.kind, "a running server"),
            "state": state,
            "reason": None if failure is None else str(failure),
            "log_tail": None if failure is None else failure.tail,
            "environment": without_secrets(method.environment),
            "engine_args": without_secrets(method.engine_args),
            "engine": self._engines.get(method.name),
        }

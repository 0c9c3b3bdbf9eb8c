"""Test only: a vLLM plug-in that switches our metrics off and on every few steps of a running
engine and notes what each step took.

What is off is all that they do in the engine's process and in its worker's, which share the switch:
without a count there is nothing to write either. Used by ``prove_metrics_cost.py``: put this folder
on PYTHONPATH and name a file in VLLM_DFLASH_STEPS, a line of which is ``on requests seconds`` for a
step.
"""

import functools
import mmap
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "VLLM_DFLASH_STEPS"
WINDOW = 4
"""Steps between two switches."""
_steps = 0


def switch() -> None:
    """The entry point: before an engine exists."""
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE])
    shared = path.with_suffix(".on")
    if not shared.exists():
        shared.write_bytes(b"\1")
    with shared.open("r+b") as file:
        on = mmap.mmap(file.fileno(), 1)
    from vllm.v1.engine.core import EngineCore

    from vllm_dflash.metrics.drafter import DrafterRecord
    from vllm_dflash.metrics.engine import EngineRecord
    from vllm_dflash.steps import Steps

    EngineRecord.observe = _switched_off(EngineRecord.observe, on)
    Steps.around_update = _switched(
        Steps.around_update,
        on,
        lambda steps: all(isinstance(o, EngineRecord) for o in steps._observers),
    )
    DrafterRecord.watch = _switched(DrafterRecord.watch, on, lambda record: True)
    EngineCore.step = _timed(EngineCore.step, path, on)


def _switched_off(observe: Any, on: mmap.mmap) -> Any:
    def observing(self: Any, step: Any) -> None:
        if on[0]:
            observe(self, step)

    return observing


def _switched(watch: Any, on: mmap.mmap, is_for_metrics: Any) -> Any:
    """Reading a step is of the metrics' cost where nobody else watches."""

    def watching(self: Any, method: Any) -> Any:
        watched = watch(self, method)

        @functools.wraps(method)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (watched if on[0] or not is_for_metrics(self) else method)(*args, **kwargs)

        return either

    return watching


def _timed(step: Any, path: Path, on: mmap.mmap) -> Any:
    lines: list[str] = []

    @functools.wraps(step)
    def timing(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _steps
        began = time.perf_counter()
        found = step(self, *args, **kwargs)
        lines.append(f"{on[0]} {len(self.scheduler.running)} {time.perf_counter() - began:.7f}\n")
        _steps += 1
        if _steps % WINDOW == 0:
            on[0] = 1 - on[0]
        if len(lines) >= 256 * WINDOW:
            with path.open("a") as file:
                file.writelines(lines)
            lines.clear()
        return found

    return timing

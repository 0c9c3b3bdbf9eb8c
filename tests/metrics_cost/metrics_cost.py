"""Test only: a vLLM plug-in that switches our metrics off and on every few steps of a running engine and notes what each step took.

What is off is all that they do in the engine's process: without a count there is nothing to write either. Used by ``prove_metrics_cost.py``:
put this folder on PYTHONPATH and name a file in VLLM_DFLASH_STEPS, a line of which is ``on requests seconds`` for a step.
"""

import functools
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "VLLM_DFLASH_STEPS"
WINDOW = 4
"""Steps between two switches."""
_on = True
_steps = 0


def switch() -> None:
    """The entry point: before an engine exists."""
    if VARIABLE not in os.environ:
        return
    from vllm.v1.engine.core import EngineCore

    from vllm_dflash.metrics.drafter import DrafterRecord
    from vllm_dflash.metrics.engine import EngineRecord

    for owner, name in ((EngineRecord, "watch_schedule"), (EngineRecord, "watch_update"), (DrafterRecord, "watch")):
        setattr(owner, name, _switched(getattr(owner, name)))
    EngineCore.step = _timed(EngineCore.step, Path(os.environ[VARIABLE]))


def _switched(watch: Any) -> Any:
    def watching(self: Any, method: Any) -> Any:
        watched = watch(self, method)

        @functools.wraps(method)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (watched if _on else method)(*args, **kwargs)

        return either

    return watching


def _timed(step: Any, path: Path) -> Any:
    lines: list[str] = []

    @functools.wraps(step)
    def timing(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _on, _steps
        began = time.perf_counter()
        found = step(self, *args, **kwargs)
        lines.append(f"{int(_on)} {len(self.scheduler.running)} {time.perf_counter() - began:.7f}\n")
        _steps += 1
        if _steps % WINDOW == 0:
            _on = not _on
        if len(lines) >= 256 * WINDOW:
            with path.open("a") as file:
                file.writelines(lines)
            lines.clear()
        return found

    return timing

"""What the tests of the cluster run in Ray's actors and engines: a stand-in for the engine,
counters, and a scheduler that one prompt ends.

Importable by every process: the tests put this folder on PYTHONPATH.
"""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.cluster.completer import Completer, count
from vllm_dflash.cluster.parts import Part, read, write
from vllm_dflash.cluster.rows import failed

POISON = [7, 7, 7, 7]
"""Token ids of a prompt that ends an engine with ``POISONED``."""
POISONED = {"scheduler_cls": "cluster_poison.PoisonedScheduler"}


class StandIn:
    """Answers at once. Where the folder holds a file named ``die-on-NUMBER``, the process of that
    part ends, once; with ``always-die-on-NUMBER``, each. Each process leaves a file named
    ``started-PID``."""

    def __init__(
        self, engine_args: Mapping[str, Any], sampling: Mapping[str, Any], folder: str
    ) -> None:
        self._folder = Path(folder)
        (self._folder / "_batch" / f"started-{os.getpid()}").touch()

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        part = Part(
            **{
                name: values[0].item() if hasattr(values[0], "item") else values[0]
                for name, values in batch.items()
            }
        )
        trap = self._folder / "_batch" / f"die-on-{part.number}"
        if trap.exists():
            trap.unlink()
            os._exit(1)
        if (self._folder / "_batch" / f"always-die-on-{part.number}").exists():
            os._exit(1)
        rows = []
        for row, problem in read(part):
            good = {
                "completion": row.get("prompt"),
                "finish_reason": "stop",
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "error": None,
            }
            if row.get("prompt") == "wrong":
                problem = "this row cannot be answered"
            rows.append(row | failed(problem or "") | (good if problem is None else {}))
        await asyncio.sleep(0)
        write(part, self._folder, rows)
        yield {name: [value] for name, value in count(rows).items()}


class Starting(Completer):
    """Has started a process, and never gets further. That process is named in ``child``."""

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        yield self._started()

    def _start(self) -> Any:
        child = subprocess.Popen(["sleep", "600"])
        (self._folder / "_batch" / "child").write_text(str(child.pid))
        time.sleep(600)


class Waiting:
    """An engine of training that never has its first shard."""

    def __init__(self, engine_args: Mapping[str, Any], folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (self._folder / "waiting").touch()
        time.sleep(600)
        return {"count": [0]}


class Counting(Completer):
    """Leaves its engines' own counters of drafts beside the answers, one file a process."""

    def _start(self) -> Any:
        # vLLM drops an earlier engine's counters when it starts another in the same process.
        now = _counters()
        self._earlier = {
            name: value + now[name]
            for name, value in getattr(self, "_earlier", dict.fromkeys(now, 0.0)).items()
        }
        return super()._start()

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        async for done in super().__call__(batch):
            (self._folder / "_batch" / f"counters-{os.getpid()}.json").write_text(
                json.dumps(
                    {name: value + self._earlier[name] for name, value in _counters().items()}
                )
            )
            if "VLLM_DFLASH_REPORT" in os.environ:
                from engine.cluster_harness import plugin_processes

                found = plugin_processes(Path(os.environ["VLLM_DFLASH_REPORT"]))
                (self._folder / "_batch" / "processes.json").write_text(json.dumps(found))
            yield done


def _counters() -> dict[str, float]:
    from prometheus_client import REGISTRY

    names = {
        "drafts": "drafts",
        "draft_tokens": "draft_tokens",
        "accepted_tokens": "accepted_tokens",
    }
    found = dict.fromkeys(names, 0.0)
    for family in REGISTRY.collect():
        for sample in family.samples:
            for name, ours in names.items():
                if sample.name == f"vllm:spec_decode_num_{ours}_total":
                    found[name] += sample.value
    return found

"""Runs engine processes over shards: one, or several at a time on one machine, each with devices of
its own.

``generate_engine`` answers prompts, ``extract_engine`` takes hidden states.

They end with this process, however that ends. Limits: one machine; where an engine fails, the
others first finish what they have.

    pytest tests/unit/test_train_prompts.py tests/engine/test_train.py
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_dflash.engines.process import QUIET, EngineFailedError, EngineProcess, EngineRefusedError
from vllm_dflash.progress import Progress
from vllm_dflash.training.errors import TrainingError

_DEVICES = "CUDA_VISIBLE_DEVICES"


def run_engines(
    what: str,
    engine_args: Mapping[str, Any],
    jobs: Sequence[dict[str, Any]],
    engines: int,
    shown: tuple[str, str] | None = None,
) -> None:
    """Has every job done; they are dealt out in turn.

    Args:
        what: ``generate`` or ``extract``, whose module ``..._engine`` is run.
        jobs: what that module takes; ``count`` is the sequences of one.
        shown: the progress line's title and unit, where they are not ``what`` and answers.

    Raises:
        TrainingError: there are too few devices, or an engine failed; the end of its output is in
            the message.
    """
    parts = [part for i in range(engines) if (part := list(jobs[i::engines]))]
    places = device_sets(
        len(parts),
        int(engine_args.get("tensor_parallel_size", 1)),
        os.environ.get(_DEVICES),
        _count(),
    )
    total = sum(job["count"] for job in jobs)
    title, unit = shown or (what, " answers")
    with (
        Progress(total=total, desc=title, unit=unit) as bar,
        ThreadPoolExecutor(len(parts)) as pool,
    ):
        runs = [
            pool.submit(_run, what, engine_args, part, place, bar)
            for part, place in zip(parts, places, strict=True)
        ]
    for run in runs:
        run.result()


def device_sets(engines: int, each: int, visible: str | None, count: int) -> list[str | None]:
    """What each engine's CUDA_VISIBLE_DEVICES is to be; None where it is to stay as it is: a single
    engine, or no device at all. Pure.

    Raises:
        TrainingError: there are fewer than ``engines`` times ``each``.
    """
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    if engines == 1 or not count:
        return [None] * engines
    if len(names) < engines * each:
        raise TrainingError(
            f"engines {engines} x tensor_parallel_size {each} need {engines * each} devices, and"
            f" {len(names)} are there: lower engines"
        )
    return [",".join(names[i * each : (i + 1) * each]) for i in range(engines)]


def _count() -> int:
    import torch

    return torch.cuda.device_count()


def _run(
    what: str,
    engine_args: Mapping[str, Any],
    jobs: list[dict[str, Any]],
    devices: str | None,
    bar: Any,
) -> None:
    env = QUIET | ({} if devices is None else {_DEVICES: devices})
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with EngineProcess(
                f"vllm_dflash.training.{what}_engine", engine_args, Path(scratch, "log"), env
            ) as engine:
                engine.wait_until_ready()
                for job in jobs:
                    engine.do(job, bar.update)
        except EngineRefusedError as refusal:
            raise TrainingError(str(refusal)) from None
        except EngineFailedError as error:
            raise TrainingError(
                f"the target's engine {error}: the end of its output says why\n{error.tail}"
            ) from None

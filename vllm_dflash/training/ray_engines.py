"""The stage generate on a cluster: Ray Data hands the shards to a pool of engines, each with its
devices, and again to another where one is lost.

Needs ``pip install 'vllm-dflash[ray]'``. Limits: all nodes see the run's folder and the target
under the same path; an engine's devices are on one node. What is finished stays, as without Ray.
Tests: ``pytest tests/engine/test_train_ray.py``.

    vllm-dflash train ... --engines 16 --engines-on-ray
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dflash.cluster.room import Room
from vllm_dflash.engines.process import DEFAULT_ENV, ENV, QUIET
from vllm_dflash.progress import Progress
from vllm_dflash.training.errors import TrainingError


class _Engine:
    """An actor of the pool."""

    def __init__(self, engine_args: dict[str, Any], folder: str) -> None:
        from vllm_dflash.engines.child import start_llm

        os.chdir(folder)
        self.llm = start_llm(engine_args)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from vllm_dflash.training.generate_engine import answer

        return {"count": [answer(self.llm, json.loads(job)) for job in batch["job"]]}


def answer_on_ray(
    engine_args: Mapping[str, Any],
    jobs: Sequence[dict[str, Any]],
    engines: int,
    shown: tuple[str, str],
) -> None:
    """Has every job done, on the cluster of RAY_ADDRESS or on this machine; ``shown``: the progress
    line's title and unit.

    Raises:
        TrainingError: Ray is not installed, the cluster has too few GPUs, or an engine failed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise TrainingError(
            "engines_on_ray takes Ray: pip install 'vllm-dflash[ray]', or leave it out"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    room, finished = Room(), False
    try:
        pool = min(engines, len(jobs))
        gpus = _gpus_each(
            int(engine_args.get("tensor_parallel_size", 1)),
            pool,
            int(ray.cluster_resources().get("GPU", 0)),
        )
        rows = [
            {"job": json.dumps(job | {"path": str(Path(job["path"]).resolve())})} for job in jobs
        ]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Engine,
            fn_constructor_args=(dict(engine_args), os.getcwd()),
            batch_size=1,
            concurrency=pool,
            num_gpus=gpus,
            runtime_env={"env_vars": DEFAULT_ENV | QUIET | ENV},
            ray_remote_args_fn=room.options,
        )
        with Progress(total=sum(job["count"] for job in jobs), desc=shown[0], unit=shown[1]) as bar:
            for batch in done.iter_batches(batch_size=1, prefetch_batches=0):
                bar.update(int(sum(batch["count"])))
        finished = True
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"an engine on Ray failed ({error}): mend what it says; finished shards are kept"
        ) from error
    finally:
        room.give_back(calm=finished)
        if ours:
            ray.shutdown()


def _gpus_each(each: int, engines: int, there: int) -> int | None:
    """GPUs of one engine; None on a cluster without."""
    if not there:
        return None
    if there < engines * each:
        raise TrainingError(
            f"engines {engines} x tensor_parallel_size {each} need {engines * each} GPUs, and the"
            f" cluster has {there}: lower engines"
        )
    return each

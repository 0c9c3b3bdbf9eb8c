"""The stage train on several processes by Ray Train, each with its device; what they do is
``loop.train``, over Ray's process group.

Needs ``pip install 'vllm-dflash[ray]'``. Limits: all nodes see the run's folder and the target
under the same path; a worker that dies ends the command, and running it again goes on from the
newest checkpoint.

    vllm-dflash train ... --workers 2           pytest tests/unit/test_train_workers.py
"""

import os
from typing import Any

from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.settings import TABLES, Settings


def train_on_ray(settings: Settings) -> None:
    """Starts the workers, on the cluster of RAY_ADDRESS or on this machine, and waits for them.

    Raises:
        TrainingError: Ray is not installed, or a worker failed.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise TrainingError(
            "workers is more than 1, which takes Ray: pip install 'vllm-dflash[ray]', or set"
            " workers to 1"
        ) from None
    import torch

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=True, include_dashboard=False)
    try:
        TorchTrainer(
            _worker,
            train_loop_config={"settings": settings.to_dict(), "folder": os.getcwd()},
            scaling_config=ScalingConfig(
                num_workers=settings.train.workers, use_gpu=torch.cuda.is_available()
            ),
            run_config=RunConfig(
                name="train", storage_path=os.path.abspath(os.path.join(settings.run.out, "ray"))
            ),
        ).fit()
    except Exception as error:  # Ray wraps a worker's error in classes of its own
        raise TrainingError(
            f"a worker failed ({error}): mend what it says, and the same command goes on from the"
            " newest checkpoint"
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _worker(config: dict[str, Any]) -> None:
    """One process of the group."""
    from vllm_dflash.training import drafter, loop, target

    os.chdir(config["folder"])
    settings = Settings(
        **{name: kind(**_tuples(config["settings"][name])) for name, kind in TABLES.items()}
    )
    found = target.find_target(settings)
    plan, _ = drafter.plan(settings, found)
    loop.train(settings, plan, found, target.load_target(found, settings, target.device()))


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
    }

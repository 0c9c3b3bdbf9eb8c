"""FSDP: each worker keeps its part of the weights, the gradients and the optimizer's state, in
place of all of them.

Weights are whole from a forward to its backward, in the precision of the masters, and no longer.
Checkpoints hold whole tensors, so a run may go on with another number of workers, or without
sharding. Tests: ``pytest tests/unit/test_train_workers.py``.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(objective: nn.Module, device: torch.device) -> None:
    """Takes the module's parameters apart over all workers; its backward then sums their
    gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(objective, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    assert isinstance(objective, FSDPModule)
    # A sum, as the loss is divided by what the whole batch weighs; by the one operation that every
    # backend has.
    objective.set_gradient_divide_factor(1.0)
    objective.set_force_sum_reduction_for_comms(True)


def whole(value: Any) -> Any:
    """``value``, a tensor or dicts and lists of them, with every sharded tensor whole; all workers
    must call it."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This worker's part of a whole ``tensor``, where ``parameter`` is sharded."""
    if (
        not hasattr(parameter, "device_mesh")
        or tensor.shape != parameter.shape
        or hasattr(tensor, "device_mesh")
    ):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )

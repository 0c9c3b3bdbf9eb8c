"""The processes that train together: which one this is, and sums over all of them by
torch.distributed; one process needs none of it.

Every worker holds the whole drafter and its optimizer, and the gradients are summed before they are
clipped, so that all take the same step; ``sharding`` has them hold parts. Tests: ``pytest
tests/unit/test_train_workers.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among ``count``; rank 0 writes."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Workers":
        """By the process group, if there is one."""
        return (
            cls(dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else cls()
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients of all workers in place, in one message; a parameter without one
        counts as zero."""
        if self.count == 1:
            return
        kept = list(parameters)
        missing = [p for p in kept if p.grad is None]
        if missing:
            torch.autograd.backward(missing, [torch.zeros_like(p) for p in missing])
        grads = [p.grad for p in kept if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def add(self, values: Tensor) -> Tensor:
        """The sum over all workers."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

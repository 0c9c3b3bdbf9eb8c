"""The optimizer with its schedule, clipping and averaged weights: one object, whose state a
checkpoint holds.

Parameters are float32 masters; matrix products run in the precision of autocast. Tests: ``pytest
tests/unit/test_train_optimizer.py``.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vllm_dflash.kinds import kind_of
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.training.sharding import like, whole
from vllm_dflash.training.tables import Train

_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95
_LINEAR_DECAY = 0.4
"""Share of the steps over which the schedule ``linear`` falls."""


def learning_rate(table: Train, step: int, steps: int) -> float:
    """Of a step counted from 0: a linear rise, then a cosine to 0 or a level with a linear end."""
    rise = max(1, round(table.warmup * steps))
    if step < rise:
        return table.lr * (step + 1) / rise
    if table.schedule == "linear":
        return table.lr * min(1.0, (steps - step) / max(1.0, _LINEAR_DECAY * steps))
    return table.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 take no longer than in float32; a processor without AVX-512
    takes eight times as long."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _NoBfloat16(TorchFunctionMode):
    """Inside it ``Tensor.bfloat16()`` copies and does not round: ``torch.optim.Muon``
    orthogonalizes in bfloat16 and has no setting for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is Tensor.bfloat16 else func(*args, **kwargs or {})


class Optimizer:
    """AdamW on everything, or Muon on the layers' matrices and AdamW on the rest."""

    def __init__(self, drafter: Drafter, table: Train, steps: int) -> None:
        self.drafter, self.table, self.steps = drafter, table, steps
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        kind, config = kind_of(drafter.config), drafter.config
        shares = kind.context.shares
        # A step sees few of their rows.
        tables = [n for n, s in kind.head.own_tensors(config).items() if s[0] == config.vocab_size]
        matrices = [
            p
            for n, p in drafter.named_parameters()
            if p.requires_grad and p.ndim == 2 and n != shares and n not in tables
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        groups = [{"params": rest, "weight_decay": 0.0}]
        self.optimizers: list[Any] = []
        if table.optimizer == "muon":
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=table.lr,
                    momentum=_MOMENTUM,
                    weight_decay=table.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        else:
            groups.append({"params": matrices, "weight_decay": table.weight_decay})
        self.optimizers.append(torch.optim.AdamW(groups, lr=table.lr, betas=_BETAS, fused=True))
        self.precision = (
            nullcontext() if computes_bfloat16(self.parameters[0].device) else _NoBfloat16()
        )
        self.average = (
            {n: p.detach().clone() for n, p in drafter.named_parameters()} if table.ema else {}
        )

    def step(self, step: int, loss: float) -> tuple[float, bool]:
        """Applies the gradients that are there, and clears them; returns their norm, and whether
        they were finite and so applied."""
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.table.clip or math.inf)))
        good = math.isfinite(norm) and math.isfinite(loss)
        if good:
            lr = learning_rate(self.table, step, self.steps)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with self.precision:
                    optimizer.step()
            self._average(step)
        self.drafter.zero_grad(set_to_none=True)
        return norm, good

    @torch.no_grad()
    def _average(self, step: int) -> None:
        # Early on a short average: the first weights are noise, and would stay in a long one.
        decay = min(self.table.ema, (step + 1) / (step + 10))
        for name, parameter in self.drafter.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """What is measured and exported: the averaged weights where there are some, else the
        weights; by parameter name."""
        return self.average or {n: p.detach() for n, p in self.drafter.named_parameters()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: weights, optimizers, averages; sharded where the parameters are."""
        return {
            "weights": {n: p.detach() for n, p in self.drafter.named_parameters()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        with torch.no_grad():
            for name, parameter in self.drafter.named_parameters():
                parameter.copy_(like(state["weights"][name], parameter))
            for name, tensor in self.average.items():
                tensor.copy_(like(state["average"][name], tensor))
        for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(found)
            for parameter, entry in optimizer.state.items():
                entry.update(
                    {
                        name: like(value, parameter)
                        for name, value in entry.items()
                        if isinstance(value, Tensor)
                    }
                )

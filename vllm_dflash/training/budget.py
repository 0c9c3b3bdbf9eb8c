"""What a run will take, from its settings and the models' shapes alone: parameters, memory, disk,
and arithmetic. Pure.

Arithmetic is matrix products only: 2 a parameter and token forward, 6 where weights learn, 4
through the frozen lm_head, and Muon's own; attention scores are left out. Limits: sequences are
taken as long as they may get, so a run ends sooner than this says.

    vllm-dflash train ... --dry-run             pytest tests/unit/test_train_budget.py
"""

from dataclasses import dataclass
from math import prod

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.kinds import kind_of
from vllm_dflash.training.settings import Settings
from vllm_dflash.weights import expected_tensors

_FLOAT32 = 4
_ITERATIONS = 5
"""Of Muon's orthogonalization, ``torch.optim.Muon``'s."""
_A_GPU = 4e14
"""Useful operations a second: 40 % of an H100's bfloat16."""
_A_CORE = 8e10
"""The same of a core with AVX-512 and bfloat16: 40 % of what matrix products reach by themselves;
a step of SmolLM2's drafter reached 50 %."""


@dataclass(frozen=True)
class Budget:
    """Bytes, tokens and floating-point operations."""

    parameters: int
    optimizer_bytes: int
    """Weights, gradients, the optimizer's moments and averages, all float32, on every worker; with
    fsdp its part, and whole weights for a step."""
    checkpoint_bytes: int
    """The two that are kept."""
    cache_bytes: int
    """Of features on disk, if all were cached."""
    generated_tokens: int
    steps: int
    target_operations: float
    drafter_operations: float
    optimizer_operations: float
    """Muon's, on every worker; AdamW multiplies no matrices."""

    @property
    def operations(self) -> float:
        """Of the training."""
        return self.target_operations + self.drafter_operations + self.optimizer_operations

    def hours(self, operations_a_second: float) -> float:
        """Of the training, at so many useful operations a second over all devices."""
        return self.operations / operations_a_second / 3600


def budget(
    settings: Settings, config: DrafterConfig, target_parameters: int, prompts: int
) -> Budget:
    """For so many prompts to train on, whose answers are all of ``response_tokens``."""
    table, kind = settings.train, kind_of(config)
    shapes = {
        name: shape
        for name, shape in expected_tensors(config).items()
        if name not in ("lm_head.weight", "d2t")
    }
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    parameters = sum(sizes.values())
    steps = table.steps or max(1, round(table.epochs * prompts / table.batch_size))
    sequences = steps * table.batch_size
    length = settings.data.max_prompt_tokens + settings.generate.response_tokens
    # What runs over context positions, and what runs over a block's queries.
    context = kind.context
    over_context = sum(
        n for name, n in sizes.items() if any(part in name for part in context.over_context)
    )
    over_queries = sum(
        n
        for name, n in sizes.items()
        if name.startswith("layers.") and not any(part in name for part in context.own_projections)
    )
    queries = (
        sequences * min(table.anchors, settings.generate.response_tokens - 1) * config.block_size
    )
    head = config.draft_tokens * config.hidden_size
    matrices = [s for name, s in shapes.items() if len(s) == 2 and name != context.shares]
    moments = 2 if table.optimizer == "adamw" else 1
    kept = parameters * _FLOAT32 * (1 + moments + bool(table.ema))
    dtype = getattr(torch, settings.run.dtype if settings.run.dtype != "auto" else config.dtype)
    held = kept + parameters * _FLOAT32
    if table.parallel == "fsdp":
        held = held // table.workers + parameters * _FLOAT32
    features = config.num_features * config.hidden_size * dtype.itemsize * length
    return Budget(
        parameters=parameters,
        optimizer_bytes=held,
        checkpoint_bytes=2 * kept,
        cache_bytes=features * prompts,
        generated_tokens=prompts * settings.generate.response_tokens,
        steps=steps,
        target_operations=2.0
        * target_parameters
        * length
        * (prompts if settings.features.cache else sequences),
        drafter_operations=6.0 * over_context * length * sequences
        + (6.0 * over_queries + 4.0 * head) * queries,
        optimizer_operations=(
            float(steps * sum(_orthogonalized(*shape) for shape in matrices))
            if table.optimizer == "muon"
            else 0.0
        ),
    )


def _orthogonalized(rows: int, columns: int) -> int:
    """Operations of one step of Muon on a matrix: its Gram matrix, that one's square, and the
    product with the matrix, in each iteration."""
    small, large = sorted((rows, columns))
    return _ITERATIONS * (4 * small**2 * large + 2 * small**3)


def as_text(found: Budget, workers: int, cores: int | None) -> str:
    """Lines for ``--dry-run``.

    Args:
        cores: that a worker trains on; None where each has a GPU.
    """
    share, own = (
        part / found.operations for part in (found.target_operations, found.optimizer_operations)
    )
    muon = f", Muon's {own:.0%}" if own else ""
    if cores is None:
        hours = (
            f"{found.hours(_A_GPU * workers):,.1f} hours at {_A_GPU / 1e12:.0f} TFLOP/s a worker"
        )
        why = "(40 % of an H100's bfloat16)"
    else:
        each = f"{_A_CORE / 1e9:.0f} GFLOP/s a core"
        hours = f"{found.hours(_A_CORE * cores * workers):,.1f} hours at {each}, {cores} of them"
        why = "(measured with AVX-512 and bfloat16)"
    return "\n".join(
        [
            (
                f"drafter             {found.parameters / 1e6:,.1f} M parameters;"
                f" {found.optimizer_bytes / 1e9:,.1f} GB of weights and optimizer on every worker"
            ),
            f"answers             at most {found.generated_tokens / 1e6:,.1f} M tokens",
            (
                f"disk                {found.checkpoint_bytes / 1e9:,.1f} GB of checkpoints;"
                f" {found.cache_bytes / 1e9:,.0f} GB of features, were all cached"
            ),
            (
                f"training            {found.steps:,} steps, at most {found.operations:.1e}"
                f" operations, the target's {share:.0%} of them{muon}"
            ),
            f"                    {hours} {why}",
        ]
    )

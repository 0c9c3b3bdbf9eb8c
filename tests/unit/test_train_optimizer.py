"""The schedule's shape, averaged weights, and a state that brings all of it back."""

import copy

import pytest
import torch

from pairs import random_drafter_config
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.training.optimizer import Optimizer, learning_rate
from vllm_dflash.training.tables import Train


def test_schedules() -> None:
    cosine, linear = Train(lr=1.0, warmup=0.1), Train(lr=1.0, warmup=0.1, schedule="linear")
    assert [learning_rate(cosine, s, 100) for s in (0, 4, 9, 10)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0]
    )
    assert learning_rate(cosine, 55, 100) == pytest.approx(0.5)
    assert 0 < learning_rate(cosine, 99, 100) < 0.001
    assert [learning_rate(linear, s, 100) for s in (10, 60, 80, 99)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.025]
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_brings_it_back(kind: str) -> None:
    """Two steps, then the same third one from a copy: equal to the bit, averages too."""
    table = Train(optimizer=kind, ema=0.9, lr=1e-2)

    def push(optimizer: Optimizer, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in optimizer.parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        assert optimizer.step(step, 1.0)[1]

    torch.manual_seed(0)
    first = Optimizer(new_drafter(random_drafter_config()), table, 10)
    push(first, 0)
    push(first, 1)
    second = Optimizer(new_drafter(random_drafter_config()), table, 10)
    second.load(copy.deepcopy(first.state()))
    push(first, 2)
    push(second, 2)
    for mine, theirs in (
        (first.weights(), second.weights()),
        (first.state()["weights"], second.state()["weights"]),
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(first.weights()["norm.weight"], first.state()["weights"]["norm.weight"])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    optimizer = Optimizer(new_drafter(random_drafter_config()), Train(ema=0.9), 10)
    before = {name: p.clone() for name, p in optimizer.state()["weights"].items()}
    for p in optimizer.parameters:
        p.grad = torch.full_like(p, float("nan"))
    assert optimizer.step(0, 1.0)[1] is False
    assert all(torch.equal(before[name], p) for name, p in optimizer.state()["weights"].items())
    assert all(p.grad is None for p in optimizer.parameters)


def test_muon_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no bfloat16, Muon's update is orthogonalized in float32: torch's own
    to rounding, gradients left alone."""

    def pushed(native: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        monkeypatch.setattr(
            "vllm_dflash.training.optimizer.computes_bfloat16", lambda device: native
        )
        torch.manual_seed(0)
        optimizer = Optimizer(
            new_drafter(random_drafter_config()), Train(optimizer="muon", lr=1e-2), 10
        )
        before = [p.detach().clone() for p in optimizer.parameters]
        for p in optimizer.parameters:
            p.grad = torch.randn(p.shape)
        gradients = [p.grad.clone() for p in optimizer.parameters]
        for muon in optimizer.optimizers[:1]:
            with optimizer.precision:
                muon.step()
        assert all(
            torch.equal(p.grad, g) for p, g in zip(optimizer.parameters, gradients, strict=True)
        )
        return before, [p.detach() for p in optimizer.parameters]

    before, rounded = pushed(True)
    exact = pushed(False)[1]
    moved = [
        (b - a, c - a)
        for a, b, c in zip(before, rounded, exact, strict=True)
        if not torch.equal(a, b)
    ]
    assert len(moved) >= 14
    for theirs, ours in moved:
        assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()

"""The schedule's shape, averaged weights, and a state that brings all of it back."""

import copy

import pytest
import torch

from pairs import random_drafter_config
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.training.optimizer import Optimizer, learning_rate
from vllm_dflash.training.settings import Train


def test_schedules() -> None:
    cosine, linear = Train(lr=1.0, warmup=0.1), Train(lr=1.0, warmup=0.1, schedule="linear")
    assert [learning_rate(cosine, s, 100) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(cosine, 55, 100) == pytest.approx(0.5)
    assert 0 < learning_rate(cosine, 99, 100) < 0.001
    assert [learning_rate(linear, s, 100) for s in (10, 60, 80, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.025])


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
    for mine, theirs in ((first.weights(), second.weights()), (first.state()["weights"], second.state()["weights"])):
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

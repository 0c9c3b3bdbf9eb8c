"""Position weights, labels, the weighted loss and the predicted acceptance length, against figures
worked by hand.

Tests: ``pytest tests/unit/test_loss.py``.
"""

import math

import pytest
import torch

from vllm_dflash.reference.loss import (
    acceptance_length,
    block_labels,
    block_loss,
    default_gamma,
    position_weights,
)


def test_published_gammas() -> None:
    assert [default_gamma(b) for b in (8, 10, 16)] == [4.0, 5.0, 7.0]


def test_gamma_between_and_outside() -> None:
    assert default_gamma(9) == 4.5
    assert default_gamma(13) == 6.0
    assert default_gamma(4) == 2.0
    assert default_gamma(32) == 14.0
    gammas = [default_gamma(b) for b in range(2, 40)]
    assert gammas == sorted(gammas)


def test_position_weights() -> None:
    weights = position_weights(8)
    assert weights.shape == (7,)
    assert weights[0] == 1
    assert weights.tolist() == pytest.approx([math.exp(-(k - 1) / 4.0) for k in range(1, 8)])
    assert position_weights(8, 1.0)[3].item() == pytest.approx(math.exp(-3))


def test_labels_start_after_the_anchor_and_end_with_the_sequence() -> None:
    tokens = torch.arange(100, 110)[None]
    labels, valid = block_labels(tokens, torch.tensor([[2, 7, 9]]), 4)
    assert labels[0, 0].tolist() == [103, 104, 105]
    assert valid[0, 0].all()
    assert labels[0, 1, :2].tolist() == [108, 109]
    assert valid[0, 1].tolist() == [True, True, False]
    assert not valid[0, 2].any()


def test_loss_is_the_weighted_mean_over_what_is_valid() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 2, 3, 5), torch.randint(5, (1, 2, 3))
    valid = torch.tensor([[[True, True, True], [True, False, False]]])
    weights = torch.tensor([1.0, 0.5, 0.25])
    total = mass = 0.0
    for n in range(2):
        for k in range(3):
            if valid[0, n, k]:
                total += (
                    weights[k].item() * -logits[0, n, k].log_softmax(-1)[labels[0, n, k]].item()
                )
                mass += weights[k].item()
    assert block_loss(logits, labels, valid, weights).item() == pytest.approx(
        total / mass, rel=1e-5
    )


def test_loss_of_nothing_valid_is_zero_and_not_nan() -> None:
    labels = torch.zeros(1, 1, 3, dtype=torch.long)
    loss = block_loss(torch.randn(1, 1, 3, 5), labels, labels.bool(), torch.ones(3))
    assert loss.item() == 0


def test_acceptance_counts_only_the_prefix() -> None:
    labels = torch.tensor([[[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]])
    predicted = torch.tensor([[[1, 2, 3], [1, 0, 3], [0, 2, 3], [1, 2, 3]]])
    valid = torch.ones(1, 4, 3, dtype=torch.bool)
    valid[0, 3, 2] = False
    assert acceptance_length(predicted, labels, valid).item() == pytest.approx(
        1 + (3 + 1 + 0 + 2) / 4
    )

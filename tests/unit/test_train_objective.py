"""The loss is the papers', whatever way a batch is cut; flex attention sees what the dense mask
shows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pairs import random_drafter_config
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.loss import position_weights
from vllm_dflash.reference.masks import context_mask
from vllm_dflash.training import flex, objective
from vllm_dflash.training.batches import Batch
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.objective import Objective, denominator, dpace_weights, gamma_at
from vllm_dflash.training.tables import Train

VOCAB, LENGTH, ROWS, BLOCKS = 512, 40, 4, 5


class Frozen:
    """A target's two tables."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.embedding, self.lm_head = (
            torch.nn.Embedding(VOCAB, 64),
            torch.nn.Linear(64, VOCAB, bias=False),
        )
        for table in (self.embedding, self.lm_head):
            table.weight.data.normal_(0, 0.5, generator=generator).requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding


@pytest.fixture
def drafter():
    torch.manual_seed(0)
    return new_drafter(random_drafter_config())


def batch() -> tuple[torch.Tensor, np.ndarray, Batch]:
    """Tokens, lengths and blocks; some sequences are short, some blocks do not exist, some are cut
    by the end."""
    rng = np.random.default_rng(0)
    lengths = np.array([40, 31, 38, 22])
    anchors = np.stack(
        [np.sort(rng.choice(np.arange(8, n - 1), BLOCKS, replace=False)) for n in lengths]
    )
    exists = np.ones((ROWS, BLOCKS), bool)
    exists[1, 3:] = False
    return (
        torch.from_numpy(rng.integers(2, VOCAB, (ROWS, LENGTH))),
        lengths,
        Batch(np.arange(ROWS), anchors, exists),
    )


def sums(
    drafter, table: Train, weights: torch.Tensor, parts: int = 1, blocks=context_mask
) -> tuple[float, float]:
    """The batch's loss and accepted tokens, cut into so many forwards; gradients are left in the
    drafter."""
    tokens, lengths, whole = batch()
    features = torch.randn(ROWS, LENGTH, 3 * 64, generator=torch.Generator().manual_seed(1))
    divisor = denominator(whole, lengths, 8, None if table.weighting == "dpace" else weights)
    run, size, out = Objective(Frozen(), drafter, table, blocks), ROWS // parts, np.zeros(2)
    for at in range(0, ROWS, size):
        part = whole.part(at, size)
        rest = (
            torch.from_numpy(lengths[at : at + size]),
            torch.from_numpy(part.anchors),
            torch.from_numpy(part.exists),
            weights,
        )
        loss, accepted = run(features[at : at + size], tokens[at : at + size], *rest)
        (loss / divisor).backward()
        out += [loss.item() / divisor, accepted.item()]
    return float(out[0]), float(out[1])


def by_hand(drafter, weights: torch.Tensor, alpha: float | None) -> float:
    """The same, block by block, with an attention of its own (PyTorch's, no mask) and the formulas
    as printed."""
    tokens, lengths, whole = batch()
    features = torch.randn(ROWS, LENGTH, 3 * 64, generator=torch.Generator().manual_seed(1))
    frozen, total, divisor = Frozen(), 0.0, 0.0
    for row in range(ROWS):
        kv = drafter.context_kv(
            drafter.context(features[row : row + 1]), torch.arange(LENGTH)[None]
        )
        for a in whole.anchors[row][whole.exists[row]]:
            ids = torch.tensor([[int(tokens[row, a])] + [1] * 7])
            hidden = drafter(
                frozen.embedding(ids),
                torch.arange(a, a + 8)[None],
                [(k[:, :a], v[:, :a]) for k, v in kv],
            )
            count = min(7, int(lengths[row]) - 1 - a)
            ce = F.cross_entropy(
                frozen.lm_head(hidden[0, 1 : 1 + count]),
                tokens[row, a + 1 : a + 1 + count],
                reduction="none",
            ).tolist()
            if alpha is None:
                total += sum(w * c for w, c in zip(weights.tolist(), ce, strict=False))
                divisor += sum(weights[:count].tolist())
            else:
                q = [(1 - alpha) * float(np.exp(-c)) + alpha for c in ce]
                total += sum(
                    sum(float(np.prod(q[: m + 1])) for m in range(j, count)) * ce[j]
                    for j in range(count)
                )
                divisor += 1
    return total / divisor


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_it_is_the_formula(drafter, weighting: str) -> None:
    table, weights = Train(weighting=weighting), position_weights(8, 4.0)
    loss, _ = sums(drafter, table, weights)
    with torch.no_grad():
        assert loss == pytest.approx(
            by_hand(drafter, weights, 0.5 if weighting == "dpace" else None), rel=1e-4
        )


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_how_a_batch_is_cut_does_not_matter(
    drafter, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of one forward, of four, and of logits ranked in pieces: a mean of means
    would differ, as lengths do."""
    table, weights = Train(weighting=weighting), position_weights(8, 4.0)
    found = []
    for parts, at_once in ((1, 1 << 28), (4, 1 << 28), (1, 3 * 7 * VOCAB)):
        monkeypatch.setattr(objective, "_LOGITS_AT_ONCE", at_once)
        drafter.zero_grad()
        loss = sums(drafter, table, weights, parts)
        found.append((loss, torch.cat([p.grad.flatten() for p in drafter.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5)


def test_dpace_weights_fall_and_follow_confidence() -> None:
    """A position counts for all that can only be accepted after it; where the drafter is sure,
    later positions gain."""
    valid = torch.ones(1, 3, dtype=torch.bool)
    sure, unsure = (dpace_weights(torch.full((1, 3), ce), valid, 0.5)[0] for ce in (0.0, 9.0))
    assert sure.tolist() == [3.0, 2.0, 1.0]
    assert unsure.tolist() == pytest.approx([0.875, 0.375, 0.125], abs=1e-3)
    assert dpace_weights(torch.zeros(1, 3), torch.tensor([[True, True, False]]), 0.5).tolist() == [
        [2.0, 1.0, 0.0]
    ]


def test_gamma_rises() -> None:
    table = Train(gamma_warmup=0.5)
    assert [gamma_at(table, 8, s, 100) for s in (0, 25, 50, 99)] == [1.0, 2.5, 4.0, 4.0]
    assert gamma_at(Train(gamma=6.0, gamma_start=2.0), 8, 25, 100) == 4.0
    assert [gamma_at(Train(gamma_start=4.0), 8, s, 100) for s in (0, 50, 99)] == [4.0, 4.0, 4.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention(drafter) -> None:
    """On a CPU only forward: PyTorch has no backward of it there."""
    table, weights = Train(), position_weights(8, 4.0)
    tokens, lengths, whole = batch()
    features = torch.randn(ROWS, LENGTH, 3 * 64, generator=torch.Generator().manual_seed(1))
    rest = (
        torch.from_numpy(lengths),
        torch.from_numpy(whole.anchors),
        torch.from_numpy(whole.exists),
        weights,
    )
    with torch.no_grad():
        dense = Objective(Frozen(), drafter, table)(features, tokens, *rest)
        flex.use(drafter)
        sparse = Objective(Frozen(), drafter, table, flex.block_mask)(features, tokens, *rest)
    assert sparse[0].item() == pytest.approx(dense[0].item(), rel=1e-4)
    assert sparse[1].item() == dense[1].item()


def test_flex_attention_refuses_sliding_layers() -> None:
    with pytest.raises(TrainingError, match="set attention to dense"):
        flex.use(new_drafter(random_drafter_config(sliding_windows=(16, None, None))))

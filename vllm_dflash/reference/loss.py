"""The training loss of a block and the acceptance that it predicts. Pure tensor logic; the home of
gamma's default.

Tests: ``pytest tests/unit/test_loss.py``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_dflash.kinds import AFTER_ANCHOR

_PUBLISHED_GAMMA = ((8, 4.0), (10, 5.0), (16, 7.0))
"""(block size, gamma) of arXiv 2602.06036."""


def default_gamma(block_size: int) -> float:
    """The papers' gamma for a block size: linear between the published ones, in proportion outside
    them."""
    for (b0, g0), (b1, g1) in pairwise(_PUBLISHED_GAMMA):
        if b0 <= block_size <= b1:
            return g0 + (g1 - g0) * (block_size - b0) / (b1 - b0)
    b, g = _PUBLISHED_GAMMA[0] if block_size < _PUBLISHED_GAMMA[0][0] else _PUBLISHED_GAMMA[-1]
    return g * block_size / b


def position_weights(
    block_size: int, gamma: float | None = None, first_row: int = AFTER_ANCHOR
) -> Tensor:
    """w_k = exp(-(k - 1) / gamma) for k = 1..K, float32 [K]; K is ``block_size - first_row``,
    mostly b - 1."""
    return torch.exp(
        -torch.arange(block_size - first_row, dtype=torch.float32)
        / (gamma or default_gamma(block_size))
    )


def block_labels(
    tokens: Tensor, anchors: Tensor, block_size: int, first_row: int = AFTER_ANCHOR
) -> tuple[Tensor, Tensor]:
    """Labels x[a+1..a+K] int64 [B, N, K] and which of them exist, bool [B, N, K]; K is ``block_size
    - first_row``.

    Args:
        tokens: [B, S] token ids.
        anchors: [B, N] positions.
    """
    at = anchors[..., None] + torch.arange(1, block_size - first_row + 1, device=anchors.device)
    valid = at < tokens.shape[1]
    labels = tokens.gather(1, at.clamp(max=tokens.shape[1] - 1).flatten(1)).view(at.shape)
    return labels.long(), valid


def block_loss(logits: Tensor, labels: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy, a float32 scalar.

    Args:
        logits: [..., K, V], of the block's rows that predict.
        labels, valid: [..., K], from ``block_labels``.
        weights: [K], from ``position_weights``.
    """
    each = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none").view(
        labels.shape
    )
    weighted = weights.to(each.device) * valid
    return (each * weighted).sum() / weighted.sum().clamp(min=1e-6)


def acceptance_length(predicted: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """1 + the mean length of the all-correct prefix over the given anchors, float32 scalar.

    With anchors everywhere this is more than decoding's tau: a decoder skips ahead where drafts are
    long, and so starts more of its blocks at hard places. Report ``decoding.generate``'s.
    Blocks that the sequence's end cuts short count only what exists, so take anchors with whole
    blocks for a figure to report.
    """
    correct = ((predicted == labels) & valid).float()
    return 1 + correct.cumprod(-1).sum(-1).mean()

"""Who sees whom when many blocks of one sequence are trained in one forward. Pure tensor logic.

Tests: ``pytest tests/unit/test_masks.py``.
"""

import torch
from torch import Tensor


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """Positions [B, N * block_size] of the blocks that start at ``anchors`` [B, N]."""
    return (anchors[..., None] + torch.arange(block_size, device=anchors.device)).flatten(1)


def context_mask(anchors: Tensor, block_size: int, context_length: int) -> Tensor:
    """Boolean [B, 1, N * block_size, context_length]: a block of anchor a sees the context
    positions before a.

    Position a itself is not context: the target has not run over the anchor when its block is
    drafted.
    """
    seen = torch.arange(context_length, device=anchors.device) < anchors[..., None]
    return seen.repeat_interleave(block_size, dim=1)[:, None]


def training_mask(anchors: Tensor, block_size: int, context_length: int) -> Tensor:
    """Boolean SDPA mask [B, 1, N * block_size, context_length + N * block_size], true where a query
    may look.

    ``context_mask``, and beside it each block's own positions, in both directions; never another
    block.

    Args:
        anchors: [B, N], positions in the sequence; any order, repeats allowed.
    """
    rows, blocks = anchors.shape
    owner = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)
    own = (owner[:, None] == owner).expand(rows, 1, -1, -1)
    return torch.cat([context_mask(anchors, block_size, context_length), own], dim=-1)


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Boolean [B, 1, Q, K]: a query sees keys less than ``window`` positions away, itself included,
    as vLLM's sliding layers.

    Args:
        query_positions: [B, Q].
        key_positions: [B, K].
    """
    distance = query_positions[:, :, None] - key_positions[:, None]
    return (distance.abs() < window)[:, None]

"""Attention of many blocks by PyTorch's flex attention, for a GPU: scores that no query may see are
never computed.

Takes the place of ``reference.drafter.block_attention`` and ``masks.context_mask`` in a drafter
whose layers all see everything.
Limits: no sliding windows; compiled on CUDA only, where it has not been run by our tests; on a CPU
PyTorch's unfused form, forward only.

    pytest tests/unit/test_train_objective.py
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.training.errors import TrainingError


def use(drafter: Drafter) -> None:
    """Makes every layer of ``drafter`` attend by flex attention; the mask is then ``block_mask``'s.

    Raises:
        TrainingError: it has sliding layers.
    """
    if any(window is not None for window in drafter.config.windows):
        raise TrainingError(
            "attention flex knows no sliding windows, which this drafter has: set attention to"
            " dense"
        )
    for layer in drafter.layers:
        layer.self_attn.attend_blocks = attend


def block_mask(anchors: Tensor, block_size: int, context_length: int) -> BlockMask:
    """``masks.training_mask`` without its elements: context positions before a block's anchor [B,
    N], and the block itself."""
    rows, blocks = anchors.shape

    def seen(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= context_length) & ((k - context_length) // block_size == q // block_size)
        return (k < anchors[b, q // block_size]) & (k < context_length) | own

    queries = blocks * block_size
    return create_block_mask(
        seen, rows, None, queries, context_length + queries, device=str(anchors.device)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    mask: Any,
    block_size: int,
    causal: bool = False,
) -> Tensor:
    """``block_attention`` under a ``block_mask``; the same arguments, [B, Q or S, heads,
    head_dim]."""
    assert not causal, "only sliding layers are, and ``use`` refuses them"
    keys, values = (
        torch.cat(pair, dim=1).transpose(1, 2) for pair in ((key, own_key), (value, own_value))
    )
    # Autocast leaves norms in float32 and values in bfloat16.
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    run = _compiled() if query.is_cuda else flex_attention
    return run(query.transpose(1, 2), keys, values, block_mask=mask).transpose(1, 2)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)

"""The training mask, compared with the rule said in words, entry by entry.

Tests: ``pytest tests/unit/test_masks.py``.
"""

import pytest
import torch

from vllm_dflash.reference.drafter import block_attention
from vllm_dflash.reference.masks import block_positions, context_mask, training_mask


@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_every_entry(block_size: int) -> None:
    anchors, context = torch.tensor([[2, 5, 5, 0], [9, 1, 4, 7]]), 10
    mask = training_mask(anchors, block_size, context)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 4 * block_size, context + 4 * block_size)
    for row in range(2):
        for query in range(4 * block_size):
            anchor = anchors[row, query // block_size].item()
            for key in range(context):
                assert mask[row, 0, query, key] == (key < anchor), (
                    "the context ends before the anchor"
                )
            for other in range(4 * block_size):
                same = other // block_size == query // block_size
                assert mask[row, 0, query, context + other] == same, (
                    "all of the own block, in both directions, and no other"
                )


def test_context_mask_is_the_left_part() -> None:
    anchors = torch.tensor([[2, 5], [9, 1]])
    assert torch.equal(context_mask(anchors, 4, 10), training_mask(anchors, 4, 10)[..., :10])


def test_block_positions() -> None:
    assert block_positions(torch.tensor([[3, 10]]), 4).tolist() == [[3, 4, 5, 6, 10, 11, 12, 13]]


def test_block_attention_equals_masked_attention() -> None:
    """The split attention that training runs gives what SDPA gives under the full mask, outputs and
    gradients."""
    torch.manual_seed(0)
    anchors, size, length = torch.tensor([[2, 5, 0], [6, 1, 4]]), 4, 7
    q, own_k, own_v = (torch.randn(2, 12, 3, 8, requires_grad=True) for _ in range(3))
    k, v = (torch.randn(2, length, 3, 8, requires_grad=True) for _ in range(2))
    inputs = (q, k, v, own_k, own_v)
    split = block_attention(*inputs, context_mask(anchors, size, length), size)
    keys, values = (
        torch.cat([k, own_k], 1).transpose(1, 2),
        torch.cat([v, own_v], 1).transpose(1, 2),
    )
    mask = training_mask(anchors, size, length)
    full = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask
    ).transpose(1, 2)
    torch.testing.assert_close(split, full)
    scale = torch.randn_like(split)
    gradients = (torch.autograd.grad((out * scale).sum(), inputs) for out in (split, full))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

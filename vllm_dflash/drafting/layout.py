"""Where a block goes: tokens, positions and cache slots of the drafter's queries and of its new context. Pure.

Notation as in arXiv 2602.06036: a request whose target has run over positions 0..n-1 drafts a block at positions
n..n+K that holds its anchor x[n] and K masks. All tensors stay on their device and nothing waits for the host.

    pytest tests/unit/test_layout.py
"""

from dataclasses import dataclass

import torch

PAD_SLOT_ID = -1
"""vLLM's mark for a row that writes nothing into the KV cache."""


@dataclass(frozen=True)
class BlockLayout:
    """One draft for a batch of B requests; rows are request-major, K + 1 a request."""

    input_ids: torch.Tensor
    """[B * (K + 1)] int32: each anchor followed by its masks; a block cut at ``max_model_len`` stands at the end of its rows."""
    positions: torch.Tensor
    """[B * (K + 1)] int64, below ``max_model_len``."""
    slot_mapping: torch.Tensor
    """[B * (K + 1)] int64 cache slots; ``PAD_SLOT_ID`` for rows that stand for nothing."""
    seq_lens: torch.Tensor
    """[B] int32: what each request's queries attend to, context and block."""
    context_slot_mapping: torch.Tensor
    """[N] int64 cache slots of the new context; ``PAD_SLOT_ID`` for rejected tokens."""
    sample_indices: torch.Tensor
    """[B * K] int64: the rows that predict, that is the masks."""


def block_layout(
    *,
    next_token_ids: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_rejected: torch.Tensor | None,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    mask_token_id: int,
    num_speculative_tokens: int,
    max_model_len: int,
) -> BlockLayout:
    """Lays out the blocks that follow one target forward.

    Args:
        next_token_ids: [B] int32, each request's anchor x[n].
        query_start_loc: [B + 1] int32, where each request's rows start in the target's batch of N rows.
        seq_lens: [B] int32, target sequence lengths after the forward, rejected tokens included.
        num_rejected: [B] int32 rejected tokens at the end of each request's rows, or None for none.
        block_table: [B, pages] int32, physical pages of the draft layers' KV cache.
        slot_mapping: [N] int64, slots that the target's rows have in that cache.
        page_size: tokens a page.
        mask_token_id: the token that stands for "to be drafted".
        num_speculative_tokens: K, 0 to block_size - 1.
        max_model_len: positions that exist are 0..max_model_len - 1.
    """
    device, k = seq_lens.device, num_speculative_tokens
    anchors = seq_lens if num_rejected is None else seq_lens - num_rejected
    if num_rejected is None:
        context_slots = slot_mapping
    else:
        rows = torch.arange(slot_mapping.shape[0], device=device)
        ends = query_start_loc[1:].long()
        owner = torch.searchsorted(ends, rows, right=True).clamp_(max=len(ends) - 1)
        context_slots = torch.where(rows < (ends - num_rejected)[owner], slot_mapping, PAD_SLOT_ID)

    # Attention takes a request's K + 1 rows for the last K + 1 positions of its sequence, so the rows of a block that would reach
    # past the end are moved to where their positions are; those in front of them stand for nothing.
    overflow = (anchors.long() + k - (max_model_len - 1)).clamp(min=0)[:, None]
    offsets = torch.arange(k + 1, device=device) - overflow
    positions = anchors.long()[:, None] + offsets.clamp(min=0)
    pages = block_table.gather(1, positions // page_size).long()
    slots = torch.where(offsets >= 0, pages * page_size + positions % page_size, PAD_SLOT_ID)

    input_ids = torch.where(offsets == 0, next_token_ids.to(torch.int32)[:, None], mask_token_id).to(torch.int32)
    # A mask past the end has no row; its token is never used, and any row of its request will do.
    rows_of_masks = (torch.arange(1, k + 1, device=device) + overflow).clamp(max=k)
    sample_indices = torch.arange(len(anchors), device=device)[:, None] * (k + 1) + rows_of_masks
    return BlockLayout(
        input_ids=input_ids.flatten(),
        positions=positions.flatten(),
        slot_mapping=slots.flatten(),
        seq_lens=(anchors + k + 1).clamp(max=max_model_len).to(torch.int32),
        context_slot_mapping=context_slots,
        sample_indices=sample_indices.flatten(),
    )

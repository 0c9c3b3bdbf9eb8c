"""Where a block goes: tokens, positions and cache slots of the drafter's queries and of its new
context. Pure.

Notation as in arXiv 2602.06036: a request whose target has run over positions 0..n-1 drafts a block
at positions n..n+b-1 that holds its anchor x[n] and b - 1 masks. The block is whole whatever K is:
a drafter that has only seen whole blocks drafts badly in a shorter one (docs/log.md); of the rows
that predict, which begin at the kind's ``first_row``, the first K are asked for their token.
All tensors stay on their device and nothing waits for the host.

    pytest tests/unit/test_layout.py
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllm_dflash.kinds import AFTER_ANCHOR

PAD_SLOT_ID = -1
"""vLLM's mark for a row that writes nothing into the KV cache."""


SlotMapping: TypeAlias = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Block table [B, pages] int32, positions [B, n] int64, tokens a page -> cache slots [B, n]
int64."""


def paged_slots(block_table: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """A ``SlotMapping`` for any device."""
    pages = block_table.gather(1, positions // page_size)
    return pages.long() * page_size + positions % page_size


@dataclass(frozen=True)
class BlockLayout:
    """One draft for a batch of B requests; rows are request-major, b a request."""

    input_ids: torch.Tensor
    """[B * b] int32: each anchor followed by its masks; a block cut at ``max_model_len`` stands at
    the end of its rows."""
    positions: torch.Tensor
    """[B * b] int64, below ``max_model_len``."""
    slot_mapping: torch.Tensor
    """[B * b] int64 cache slots; ``PAD_SLOT_ID`` for rows that stand for nothing."""
    seq_lens: torch.Tensor
    """[B] int32: what each request's queries attend to, context and block."""
    sample_indices: torch.Tensor
    """[B * K] int64: the rows that predict, that is of each block the first K from ``first_row``
    on."""


def block_layout(
    *,
    next_token_ids: torch.Tensor,
    anchors: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    mask_token_id: int,
    block_size: int,
    num_speculative_tokens: int,
    max_model_len: int,
    first_row: int = AFTER_ANCHOR,
    may_overflow: bool = True,
    slots: SlotMapping = paged_slots,
) -> BlockLayout:
    """Lays out the blocks that follow one target forward.

    Args:
        next_token_ids: [B] int32, each request's anchor x[n].
        anchors: [B] int32, its position n: the target's sequence length after the forward, rejected
            tokens not counted.
        block_table: [B, pages] int32, physical pages of the draft layers' KV cache.
        page_size: tokens a page.
        mask_token_id: the token that stands for "to be drafted".
        block_size: b, the drafter's own.
        num_speculative_tokens: K, 1 to b - ``first_row``.
        max_model_len: positions that exist are 0..max_model_len - 1.
        first_row: the row of a block that predicts the token after its anchor.
        may_overflow: False where the caller knows that every block ends before ``max_model_len``,
            which takes less work.
        slots: what finds the positions' cache slots.
    """
    offsets, sample_indices = _whole_block(
        len(anchors), block_size, first_row, num_speculative_tokens, anchors.device
    )
    positions = anchors[:, None] + offsets
    input_ids = torch.full_like(positions, mask_token_id, dtype=torch.int32)
    input_ids[:, 0] = next_token_ids
    if not may_overflow:
        mapped, seq_lens = slots(block_table, positions, page_size), anchors + block_size
        return BlockLayout(
            input_ids.flatten(),
            positions.flatten(),
            mapped.flatten(),
            seq_lens,
            sample_indices.flatten(),
        )
    last_positions, sample_indices = positions[:, -1:].clone(), sample_indices.clone()
    mapped = slots(block_table, positions.clamp(max=max_model_len - 1), page_size)
    end_blocks_at(
        max_model_len,
        last_positions=last_positions,
        rows=[input_ids, positions],
        slots=[mapped],
        sample_indices=sample_indices,
        first_row=first_row,
    )
    return BlockLayout(
        input_ids=input_ids.flatten(),
        positions=positions.flatten(),
        slot_mapping=mapped.flatten(),
        seq_lens=(anchors + block_size).clamp(max=max_model_len).to(torch.int32),
        sample_indices=sample_indices.flatten(),
    )


def end_blocks_at(
    max_model_len: int,
    *,
    last_positions: torch.Tensor,
    rows: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    sample_indices: torch.Tensor,
    first_row: int = AFTER_ANCHOR,
) -> None:
    """Moves, in place, each block that reaches past ``max_model_len`` back by its overflow; the
    others stay as they are.

    Attention takes a request's b query rows for the last b positions of its sequence, which ends at
    ``max_model_len``: windows and causal masks of an overflowing block would be off by the
    overflow. So its rows are moved to where their positions are, and the rows in front of them
    stand for nothing. Rows past the end fall out: their slots would be those of positions that the
    same request holds.

    Args:
        max_model_len: in tokens.
        last_positions: [B, 1] int64, each block's last one, not clamped; not changed.
        rows: [B, b] each, what is moved along: token ids and positions.
        slots: [B, b] int64 of each KV cache group; ``PAD_SLOT_ID`` in rows that stand for nothing.
        sample_indices: [B, K] int64, rows in the batch that predict.
        first_row: of each block the row that the first of ``sample_indices`` is.
    """
    masks, samples = rows[0].shape[1] - 1, sample_indices.shape[1]
    # The anchor itself always fits: vLLM's scheduler keeps one position free for it.
    overflow = (last_positions - (max_model_len - 1)).clamp_(min=0)
    offsets = torch.arange(masks + 1, device=overflow.device) - overflow
    sources = offsets.clamp(min=0)
    for buffer in rows:
        buffer.copy_(buffer.gather(1, sources))
    for group in slots:
        group.copy_(group.gather(1, sources).masked_fill_(offsets < 0, PAD_SLOT_ID))
    # A mask past the end has no row; its token is never used, and any row of its request will do.
    sample_indices += torch.minimum(
        overflow, masks - torch.arange(first_row, first_row + samples, device=overflow.device)
    )


@functools.lru_cache(maxsize=1024)
def _whole_block(
    num_reqs: int,
    block_size: int,
    first_row: int,
    num_speculative_tokens: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is the same at every step, int64: offsets in a block [b], and of each block the first K
    rows that predict [B, K]."""
    # Made outside of inference mode, as it may be used there and elsewhere.
    with torch.inference_mode(False):
        offsets = torch.arange(block_size, device=device)
        first = torch.arange(num_reqs, device=device)[:, None] * block_size
        return offsets, first + offsets[first_row : first_row + num_speculative_tokens]


@functools.lru_cache(maxsize=1024)
def block_bounds(num_reqs: int, block_size: int) -> torch.Tensor:
    """[B + 1] int32 on the host: where each block's rows begin, and the end."""
    with torch.inference_mode(False):
        return torch.arange(num_reqs + 1, dtype=torch.int32) * block_size


def sampled_anchors(
    sampled: torch.Tensor, discarded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's last sampled token [B] int32, and how many it keeps [B] int32.

    Args:
        sampled: [B, n] token ids, -1 for what was rejected.
        discarded: [B] bool, the requests whose prompt is not at its end: they keep none, and their
            anchor, whose draft nobody takes, is token 0.
    """
    kept = ((sampled >= 0).sum(1) * ~discarded).int()
    last = sampled.gather(1, (kept - 1).clamp(min=0).long()[:, None])[:, 0]
    return (last * (kept > 0)).int(), kept


def committed_rows(
    starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> slice | torch.Tensor:
    """The rows of a target batch that were committed: of each request the first ``lengths[i]`` from
    ``starts[i]`` on."""
    if len(starts) == 1:
        return slice(starts[0], starts[0] + lengths[0])
    return torch.tensor(
        [row for s, n in zip(starts, lengths, strict=True) for row in range(s, s + n)],
        dtype=torch.int64,
        device=device,
    )


def without_rejected(
    slot_mapping: torch.Tensor, query_start_loc: torch.Tensor, num_rejected: torch.Tensor
) -> torch.Tensor:
    """Cache slots [N] int64 of a target batch's rows, with ``PAD_SLOT_ID`` for rejected tokens; for
    a device that is not waited for.

    Args:
        slot_mapping: [N] int64, slots that the target's rows have in that cache.
        query_start_loc: [B + 1] int32, where each request's rows start.
        num_rejected: [B] int32 rejected tokens at the end of each request's rows.
    """
    rows = torch.arange(slot_mapping.shape[0], device=slot_mapping.device)
    ends = query_start_loc[1:].long()
    owner = torch.searchsorted(ends, rows, right=True).clamp_(max=len(ends) - 1)
    return torch.where(rows < (ends - num_rejected)[owner], slot_mapping, PAD_SLOT_ID)

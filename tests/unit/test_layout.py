"""Where a block goes, on an example small enough to work out by hand."""

import pytest
import torch

from vllm_dflash.drafting.layout import (
    PAD_SLOT_ID,
    BlockLayout,
    block_layout,
    committed_rows,
    end_blocks_at,
    sampled_anchors,
    without_rejected,
)

PAGE = 4
# Two requests. The first ran rows at positions 2..6 and two of them were rejected: n = 5. The
# second ran position 9: n = 10.
QUERY_START = torch.tensor([0, 5, 6], dtype=torch.int32)
SEQ_LENS = torch.tensor([7, 10], dtype=torch.int32)
REJECTED = torch.tensor([2, 0], dtype=torch.int32)
BLOCK_TABLE = torch.tensor([[7, 3, 9, 0], [2, 8, 5, 6]], dtype=torch.int32)
SLOTS = torch.tensor([30, 31, 12, 13, 14, 21])


def layout(
    k: int = 3, max_model_len: int = 16, block_size: int = 4, may_overflow: bool = True
) -> BlockLayout:
    return block_layout(
        next_token_ids=torch.tensor([100, 200], dtype=torch.int32),
        anchors=SEQ_LENS - REJECTED,
        block_table=BLOCK_TABLE,
        page_size=PAGE,
        mask_token_id=1,
        block_size=block_size,
        num_speculative_tokens=k,
        max_model_len=max_model_len,
        may_overflow=may_overflow,
    )


@pytest.mark.parametrize("may_overflow", [True, False])
def test_block_follows_the_committed_tokens(may_overflow: bool) -> None:
    got = layout(may_overflow=may_overflow)
    assert got.input_ids.tolist() == [100, 1, 1, 1, 200, 1, 1, 1]
    assert got.positions.tolist() == [5, 6, 7, 8, 10, 11, 12, 13]
    # Position 5 is in the first request's second page (3), at offset 1; position 8 in its third
    # (9).
    assert got.slot_mapping.tolist() == [
        3 * 4 + 1,
        3 * 4 + 2,
        3 * 4 + 3,
        9 * 4,
        5 * 4 + 2,
        5 * 4 + 3,
        6 * 4,
        6 * 4 + 1,
    ]
    assert got.seq_lens.tolist() == [9, 14]
    assert got.sample_indices.tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("may_overflow", [True, False])
def test_the_block_is_whole_whatever_k_is(may_overflow: bool) -> None:
    """The embedded drafter, trained on whole blocks of eight, has a tau of 4.3 with all its masks
    and 1.1 with one fewer."""
    got, whole = layout(k=1, may_overflow=may_overflow), layout(may_overflow=may_overflow)
    assert got.sample_indices.tolist() == [1, 5]
    for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
        assert getattr(got, name).tolist() == getattr(whole, name).tolist()


def test_rejected_rows_are_not_stored() -> None:
    assert without_rejected(SLOTS, QUERY_START, REJECTED).tolist() == [
        30,
        31,
        12,
        PAD_SLOT_ID,
        PAD_SLOT_ID,
        21,
    ]


def test_sampled_anchors() -> None:
    """A request whose prompt is not at its end keeps nothing, whatever was sampled for it."""
    sampled = torch.tensor([[5, 6, -1], [7, -1, -1], [9, 8, 3]], dtype=torch.int32)
    anchors, kept = sampled_anchors(sampled, torch.tensor([False, False, True]))
    assert (anchors.tolist(), kept.tolist()) == ([6, 7, 0], [2, 1, 0])
    assert anchors.dtype == kept.dtype == torch.int32


def test_committed_rows() -> None:
    """Where the host knows what was rejected, such rows are not even computed."""
    rows = committed_rows([0, 5], [3, 1], SLOTS.device)
    assert SLOTS[rows].tolist() == [30, 31, 12, 21]
    assert SLOTS[committed_rows([2], [2], SLOTS.device)].tolist() == [12, 13]


def test_positions_past_the_end_do_not_exist() -> None:
    """Attention takes the rows for the last positions of the sequence: a block that is cut stands
    at the end of its rows.

    Rows kept in front would be off by the overflow under a window or a causal mask. The other
    request keeps its whole block.
    """
    got = layout(max_model_len=12)
    assert got.input_ids.tolist()[:4] == [100, 1, 1, 1]
    assert got.input_ids.tolist()[6:] == [200, 1], (
        "the two rows before have no slot: they stand for nothing"
    )
    assert got.slot_mapping.tolist()[4:] == [PAD_SLOT_ID, PAD_SLOT_ID, 5 * 4 + 2, 5 * 4 + 3]
    assert got.positions.tolist()[4:] == [10, 10, 10, 11]
    assert got.seq_lens.tolist() == [9, 12]
    assert got.sample_indices.tolist() == [1, 2, 3, 7, 7, 7], (
        "the one mask that exists is the batch's last row"
    )


@pytest.mark.parametrize(
    ("first_row", "samples", "moved"),
    [(1, [[1, 2, 3], [7, 7, 7]], "rows 5 to 7"), (0, [[0, 1, 2], [6, 7, 7]], "rows 4 to 6")],
)
def test_blocks_are_moved_back_by_their_overflow(
    first_row: int, samples: list[list[int]], moved: str
) -> None:
    """Two blocks of four before position 12: the first, at 8 to 11, just fits; the second, at 10 to
    13, is two too long. Each has a slot in two KV cache groups, whose pages differ."""
    ids = torch.tensor([[100, 1, 2, 3], [200, 4, 5, 6]], dtype=torch.int32)
    positions = torch.tensor([[8, 9, 10, 11], [10, 11, 12, 13]])
    groups = [
        torch.tensor([[36, 37, 38, 39], [22, 23, 24, 25]]),
        torch.tensor([[60, 61, 62, 63], [70, 71, 40, 41]]),
    ]
    last = torch.tensor([[11], [13]])
    asked = torch.tensor([[0, 1, 2], [4, 5, 6]]) + first_row
    end_blocks_at(
        12,
        last_positions=last,
        rows=[ids, positions],
        slots=groups,
        sample_indices=asked,
        first_row=first_row,
    )
    # The second block's anchor and first mask now are its last two rows.
    assert ids[0].tolist() == [100, 1, 2, 3]
    assert ids[1, 2:].tolist() == [200, 4]
    assert positions[0].tolist() == [8, 9, 10, 11]
    assert positions[1, 2:].tolist() == [10, 11]
    nothing = [PAD_SLOT_ID, PAD_SLOT_ID]
    assert [group.tolist() for group in groups] == [
        [[36, 37, 38, 39], [*nothing, 22, 23]],
        [[60, 61, 62, 63], [*nothing, 70, 71]],
    ]
    assert asked.tolist() == samples, f"asked were {moved} of the second block"
    assert last.tolist() == [[11], [13]], "the caller's, and not changed"


def test_blocks_are_moved_without_asking_the_device() -> None:
    """A meta tensor has no values: what asked for one, or made a shape of one, would raise."""
    blocks, masks, on_device = 3, 7, torch.device("meta")

    def rows(width: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(blocks, width, dtype=dtype, device=on_device)

    end_blocks_at(
        64,
        last_positions=rows(1),
        rows=[rows(masks + 1, torch.int32), rows(masks + 1)],
        slots=[rows(masks + 1)],
        sample_indices=rows(masks),
    )
    with pytest.raises(RuntimeError, match="meta"):
        rows(1).tolist()

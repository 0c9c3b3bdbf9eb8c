"""Features that wait for the next draft."""

import torch

from vllm_dflash.drafting.pending import PendingContext


def add(pending: PendingContext, first: int, slots: list[int]) -> None:
    count = len(slots)
    pending.add(
        [torch.arange(first, first + count)[:, None]], torch.arange(count), torch.tensor(slots)
    )


def test_steps_come_back_in_order_and_once() -> None:
    pending = PendingContext(100, 1, torch.int64)
    assert pending.take() is None
    add(pending, 0, [5, 6])
    add(pending, 10, [9])
    taken = pending.take()
    assert taken is not None
    assert [part.flatten().tolist() for part in taken] == [[0, 1, 10], [0, 1, 0], [5, 6, 9]]
    assert pending.take() is None


def test_the_last_row_of_a_slot_counts() -> None:
    """A page that goes from one request to another has its slots written again; one kernel call may
    write two rows of a slot in any order."""
    pending = PendingContext(100, 1, torch.int64)
    add(pending, 0, [5, 6])
    add(pending, 10, [6, -1, -1, 7])
    taken = pending.take()
    assert taken is not None
    assert taken[2].tolist() == [5, 6, 7]
    assert taken[0].flatten().tolist() == [0, 10, 13]


def test_it_says_when_it_is_full() -> None:
    pending = PendingContext(4, 1, torch.int64)
    assert pending.fits(4)
    assert not pending.fits(5)
    add(pending, 0, [1])
    assert pending.fits(3)
    assert not pending.fits(4)


def test_features_come_side_by_side_and_are_copies() -> None:
    """What a step hands in is written over by the next."""
    pending, features, slots = (
        PendingContext(4, 4, torch.float32),
        [torch.ones(2, 3), torch.zeros(2, 1)],
        torch.tensor([7, 8]),
    )
    pending.add(features, torch.arange(2), slots)
    for tensor in (*features, slots):
        tensor.fill_(5)
    taken = pending.take()
    assert taken is not None
    assert taken[0].tolist() == [[1, 1, 1, 0]] * 2
    assert taken[2].tolist() == [7, 8]


def test_pages_of_ended_requests_are_dropped() -> None:
    """Pages of four slots; of two rows of a slot the last counts, as before."""
    pending = PendingContext(100, 1, torch.int64)
    add(pending, 0, [4, 5, 12])
    add(pending, 10, [5, 20])
    pending.keep_pages({1, 5}, 4)
    taken = pending.take()
    assert taken is not None
    assert [part.flatten().tolist() for part in taken] == [[0, 10, 11], [0, 0, 1], [4, 5, 20]]
    add(pending, 0, [4])
    pending.keep_pages(set(), 4)
    assert pending.num_rows == 0
    assert pending.take() is None

"""A step's batch is a function of the seed and the step; every sequence is met once an epoch, every
anchor is in an answer."""

import numpy as np
import pytest

from pairs import random_drafter_config
from vllm_dflash.training.batches import Plan, forward_size

LENGTHS, PROMPTS = np.array([30, 12, 25, 11, 40, 13, 28]), np.array([10, 10, 10, 10, 10, 10, 10])


def plan(seed: int = 0, anchors: int = 8) -> Plan:
    return Plan(LENGTHS, PROMPTS, 3, anchors, seed)


def test_the_same_at_any_time() -> None:
    one, other = plan(), plan()
    later = [other.batch(s) for s in (9, 3, 5)]
    for step, found in zip((9, 3, 5), later, strict=True):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(vars(one.batch(step)).values(), vars(found).values(), strict=True)
        )
    assert not np.array_equal(plan(seed=1).batch(0).anchors, plan().batch(0).anchors)


def test_epochs_hold_every_usable_sequence_once() -> None:
    """Sequence 3 has an answer of one token: nothing follows it."""
    rows = np.concatenate([plan().batch(s).rows for s in range(8)])
    for epoch in rows.reshape(-1, 6):
        assert sorted(epoch) == [0, 1, 2, 4, 5, 6]
    assert not np.array_equal(rows[:6], rows[6:12])
    assert plan().steps(2) == 4


def test_anchors_are_in_the_answer_and_a_token_follows() -> None:
    for step in range(10):
        found = plan().batch(step)
        for row, anchors, exists in zip(found.rows, found.anchors, found.exists, strict=True):
            chosen = anchors[exists]
            assert len(set(chosen)) == len(chosen) == min(8, LENGTHS[row] - PROMPTS[row] - 1)
            assert list(chosen) == sorted(chosen)
            assert min(chosen) >= PROMPTS[row]
            assert max(chosen) <= LENGTHS[row] - 2


def test_no_more_anchors_than_there_are_places() -> None:
    assert plan(anchors=512).batch(0).anchors.shape == (3, 29)


def test_answers_too_short() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        Plan(np.array([11]), np.array([10]), 1, 4, 0)


def test_a_forward_has_a_gigabyte_of_logits_at_most() -> None:
    """The defaults, 64 sequences of 512 blocks, asked for some twenty."""
    for vocabulary, block, share in [(4096, 8, 64), (151936, 16, 64), (49152, 8, 12), (64, 4, 7)]:
        config = random_drafter_config(vocab_size=vocabulary, block_size=block)
        for anchors in (1, 30, 512):
            size = forward_size(share, anchors, config)
            each = 4 * anchors * (block - 1) * vocabulary
            assert share % size == 0
            assert size == 1 or size * each <= 1 << 30
            larger = [n for n in range(size + 1, share + 1) if share % n == 0]
            assert not larger or larger[0] * each > 1 << 30
    config = random_drafter_config(vocab_size=4096, block_size=8, draft_vocab_size=512)
    assert forward_size(64, 512, config) == 64

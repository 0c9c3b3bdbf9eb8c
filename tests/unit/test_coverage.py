"""The watch over a request's draft context: holes are found, their pages kept, and left out of what is attended to.

Tests: ``pytest tests/unit/test_coverage.py``.
"""

import torch

from vllm_dflash.drafting.coverage import ContextCoverage, Hole, without_first_pages

PAGE = 4


def test_steps_that_follow_each_other_leave_no_hole() -> None:
    coverage = ContextCoverage(PAGE)
    assert coverage.step(["a", "b"], [0, 0], [6, 3], {"a", "b"}) == []
    assert coverage.step(["b", "a"], [3, 6], [4, 2], {"a", "b"}) == []
    assert coverage.step(["a", "b"], [8, 7], [4, 4], {"a", "b"}) == []
    assert vars(coverage.counts) == {"computed": 23, "reused": 0, "missing": 0}
    assert coverage.first_pages(torch.zeros(2, 4), [8, 7], [4, 4]) is None


def test_preemption_and_reuse_are_no_holes() -> None:
    coverage = ContextCoverage(PAGE)
    coverage.step(["a"], [8], [4], {"a"})
    assert coverage.step(["a"], [4], [9], {"a"}) == [], "resumed from a shorter prefix of the cache"
    assert coverage.counts.reused == 8


def test_a_skipped_step_is_a_hole() -> None:
    coverage = ContextCoverage(PAGE)
    coverage.step(["a", "b"], [0, 0], [5, 5], {"a", "b"})
    assert coverage.step(["a", "b"], [5, 7], [1, 1], {"a", "b"}) == [Hole(1, 5, 7)]
    assert coverage.counts.missing == 2


def test_bad_pages_are_left_out_until_they_are_filled_anew() -> None:
    coverage = ContextCoverage(PAGE)
    table = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    coverage.add(Hole(1, 5, 7), table[1].tolist())
    assert coverage.bad_pages == {21}
    first = coverage.first_pages(table, [9, 7], [1, 1])
    assert first is not None
    assert first.tolist() == [0, 2], "the anchor, position 8, is in the page after the bad one"
    first = coverage.first_pages(table, [9, 6], [1, 1])
    assert first is not None
    assert first.tolist() == [0, 1], "the anchor's own page stays: its holes hold zeros"
    # Another request takes the page over with the prefix cache, and a third one gets it fresh.
    first = coverage.first_pages(torch.tensor([[21, 30, 31, 32]]), [6], [1])
    assert first is not None
    assert first.tolist() == [1]
    coverage.first_pages(torch.tensor([[40, 21, 0, 0]]), [4], [4])
    assert coverage.bad_pages == set()


def test_what_ended_is_forgotten() -> None:
    coverage = ContextCoverage(PAGE)
    for i in range(1000):
        coverage.step([str(i)], [0], [4], {str(i)})
    assert len(coverage._end) < 100


def test_rows_from_their_first_pages_on() -> None:
    table = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert without_first_pages(table, torch.tensor([0, 2])).tolist() == [[1, 2, 3], [6, 6, 6]]

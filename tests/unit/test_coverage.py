"""The watch over a request's draft context: holes are found, their pages kept, and left out of what
is attended to.

Tests: ``pytest tests/unit/test_coverage.py``.
"""

from types import SimpleNamespace

import numpy as np
import pytest
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


@pytest.mark.vllm
def test_an_id_that_comes_again_is_another_request() -> None:
    """With vLLM's VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1: the end of the request before made a
    prefix hit of the next one a hole. A streaming session stays the same one."""

    from vllm_dflash.drafting.watch import ContextWatch

    class Request:
        pass

    watch = ContextWatch(SimpleNamespace(page_size=PAGE, runner=SimpleNamespace()))
    runner = watch.proposer.runner
    runner.input_batch, runner.requests = SimpleNamespace(req_ids=["a"]), {"a": Request()}
    cad = SimpleNamespace(num_reqs=1, block_table_tensor=torch.zeros(1, 4))
    watch.note(cad, [0], [4])
    watch.note(cad, [4], [2])
    runner.requests["a"] = Request()
    assert watch.note(cad, [8], [2]) is None
    assert vars(watch.coverage.counts) == {"computed": 8, "reused": 8, "missing": 0}
    assert watch.coverage.step(["a"], [12], [1], runner.requests) == [Hole(0, 10, 12)]


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


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_that_goes_on_is_counted_as_step_by_step(seed: int) -> None:
    """Steps of one position each beside prompts, holes, requests that come, go and change places:
    with and without the short way."""
    random = np.random.default_rng(seed)
    short, long = ContextCoverage(4), ContextCoverage(4)
    ends: dict[str, int] = {}
    for step in range(400):
        if not ends or random.random() < 0.1:
            ends[f"r{step}"] = 0
        if len(ends) > 1 and random.random() < 0.08:
            del ends[next(iter(ends))]
        if random.random() < 0.03:
            ends[next(iter(ends))] += 2  # a hole
        names = list(ends)
        if random.random() < 0.05:
            names.reverse()
        lengths = [5 if ends[name] == 0 else 1 for name in names]
        starts = [ends[name] for name in names]
        expected = long.step(names, starts, lengths, ends)
        goes_on = max(lengths) == 1 and short.goes_on(names, np.array(starts, dtype=np.int32))
        assert (expected if goes_on else short.step(names, starts, lengths, ends)) == expected
        assert not (goes_on and expected)
        assert short.counts == long.counts
        for name, start, length in zip(names, starts, lengths, strict=True):
            ends[name] = start + length


def test_a_batch_does_not_go_on_while_a_page_is_bad() -> None:
    """For such pages are sound again once a step fills them, which the short way would not see."""
    coverage = ContextCoverage(4)
    coverage.step(["a"], [0], [3], {"a"})
    coverage.step(["a"], [3], [1], {"a"})
    assert coverage.goes_on(["a"], np.array([4], dtype=np.int32))
    coverage.add(Hole(0, 1, 2), [7, 8])
    assert not coverage.goes_on(["a"], np.array([5], dtype=np.int32))

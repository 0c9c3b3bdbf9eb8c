"""What is kept of drafts, and the noise of seeded requests, apart from an engine."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm_dflash.drafting.verification import SeedDraws, keep_accepted


def test_drafts_are_kept_up_to_the_first_that_differs() -> None:
    # Three requests with 3, 0 and 2 drafts; one more row each.
    sampled = [7, 8, 1, 9, 4, 5, 6, 2]
    assert keep_accepted(sampled, [7, 8, 3, 5, 6], [3, 0, 2]) == [[7, 8, 1, -1], [4, -1, -1, -1], [5, 6, 2, -1]]


def test_an_accepted_token_after_a_rejected_one_is_dropped() -> None:
    assert keep_accepted([1, 2, 3], [9, 2], [2]) == [[1, -1, -1]]


def test_draws_are_vllms_whatever_is_asked_for_first() -> None:
    """vLLM draws one number a token; drafts ask for several at once, and for some again after a rejection or a preemption."""
    generator = torch.Generator().manual_seed(7)
    expected = [int(torch.randint(0, 2**31, (1,), generator=generator)) for _ in range(6)]
    draws = SeedDraws()
    assert draws.at("a", 7, range(4)) == expected[:4]
    assert draws.at("a", 7, range(2, 6)) == expected[2:]
    assert draws.at("b", 7, range(1, 2)) == expected[1:2]
    assert draws.at("a", 8, range(1)) != expected[:1]
    draws.forget_all_but({"b"})
    assert list(draws._drawn) == ["b"]

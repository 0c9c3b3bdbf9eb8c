"""tau and acceptance by position, by hand."""

import pytest

from vllm_dflash.acceptance import Acceptance, Positions, tau


def test_tau_counts_the_targets_own_token() -> None:
    assert tau(5, 2) == 3.5
    assert tau(0, 2) == 1.0
    assert tau(0, 0) is None


def test_positions_are_counted_from_the_ends_of_drafts() -> None:
    assert Positions.of([0, 2, 3, 3, 1]).counts == [4, 3, 2]
    assert Positions.of([1], 3).counts == [1, 0, 0]


def test_a_position_that_no_draft_reached_has_a_count() -> None:
    counts = Positions(1)
    counts.add(1, times=2)
    counts.reserve(3)
    counts.reserve(2)
    assert counts.counts == [2, 0, 0]


def test_acceptance_over_drafts() -> None:
    found = Acceptance.of(iter([0, 2, 1, 2]), 3)
    assert found == Acceptance(4, [3, 2, 0])
    assert (found.tau, found.rates) == (2.25, [0.75, 0.5, 0.0])


@pytest.mark.parametrize("found", [Acceptance(0, []), Acceptance.of([], 3)])
def test_without_drafts_a_step_yields_one_token(found: Acceptance) -> None:
    assert found.tau == 1.0
    assert not any(found.rates)

"""What goes between a scheduler and a proposer: for which requests, and what was drafted."""

import pickle

import pytest

from vllm_dflash.drafts import Drafts, Planned, confidences_of, skipped_of, spread


def test_a_plan_for_some_requests_is_a_number_to_whoever_knows_nothing_of_it() -> None:
    """It reaches a worker in another process as it was."""
    k = Planned(7, ["a", "b"])
    assert (k, k > 0, k + 1, f"{k}", [0] * k) == (7, True, 8, "7", [0] * 7)
    again = pickle.loads(pickle.dumps(k))
    assert (again, skipped_of(again)) == (7, frozenset("ab"))
    assert skipped_of(7) == frozenset()


@pytest.mark.parametrize("said", [True, False])
def test_drafts_of_some_requests_stand_in_their_rows(said: bool) -> None:
    drafts = Drafts([[1, 2], [3, 4]], [[0.1, 0.2], [0.3, 0.4]] if said else None)
    found = spread(drafts, [3, 1], 5)
    assert found == [[], [3, 4], [], [1, 2], []]
    assert confidences_of(found) == ([[], [0.3, 0.4], [], [0.1, 0.2], []] if said else None)

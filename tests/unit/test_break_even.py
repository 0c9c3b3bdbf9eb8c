"""Where a pair pays on a machine, from what a step costs there.

pytest tests/unit/test_break_even.py
"""

import pytest

from vllm_dflash.cost_profile import line
from vllm_dflash.tools.break_even import BreakEven, break_even, pays_check, table

K, BLOCK = 7, 8
ROWS = line((8.0, 1.0), (4.0, 0.5))
"""A step of n requests takes 8 + n, its verification 8 + 8 n, its draft 4 + 4 n."""


def test_a_step_that_drafts_over_a_plain_one() -> None:
    found = break_even(ROWS, K, BLOCK, 16, 4096)
    assert (found.loads, found.contexts) == ([1, 4, 16], [128, 2048])
    for n, row in zip(found.loads, found.tau, strict=True):
        assert row == pytest.approx(2 * [(12 + 12 * n) / (8 + n)]), "contexts cost nothing here"


def test_contexts_count_for_each_of_their_rows() -> None:
    """Read once a request, attended to by each row of the target's and of the drafter's."""
    profile = line((8.0, 1.0), (4.0, 0.5), read=1e-2, attend=1e-3, draft_attend=1e-4)
    found = break_even(profile, K, BLOCK, 1, 3000)
    plain = 9 + 2048 * (1e-2 + 1e-3)
    drafting = 24 + 2048 * (1e-2 + 8e-3 + 8e-4)
    assert found.tau[0][1] == pytest.approx(drafting / plain)


def test_a_model_of_few_positions_has_one_context() -> None:
    assert break_even(ROWS, K, BLOCK, 1, 100).contexts == [100]


SURFACE = BreakEven([1, 4, 16], [128, 2048], [[1.2, 1.5], [1.8, 2.5], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("tau", "state", "words"),
    [
        (4.5, "ok", "at all these loads and contexts: whole drafts break even at tau 1.20 to 4.00"),
        (2.0, "ok", "up to 4 at 128, up to 1 at 2,048"),
        (1.3, "ok", "up to 1 at 128, none at 2,048"),
        (1.2, "warning", "nowhere"),
        (1.0, "warning", "nowhere"),
    ],
)
def test_what_is_said(tau: float, state: str, words: str) -> None:
    check = pays_check(SURFACE, tau)
    assert check.state == state
    assert words in check.found
    assert bool(check.remedy) == (tau < 4.0)


def test_nothing_measured_is_said() -> None:
    check = pays_check(None, 3.0)
    assert check.state == "warning"
    assert "bench --break-even" in check.remedy


def test_the_table_marks_what_is_not_reached() -> None:
    lines = table(SURFACE, 2.0)
    assert " ".join(lines[1].split()) == "requests at a time 128 2,048 positions of context"
    assert [line.split() for line in lines[2:]] == [
        ["1", "1.20", "1.50"],
        ["4", "1.80", "2.50*"],
        ["16", "3.00*", "4.00*"],
    ]

"""For which request counts the draft has graphs; the sizes are vLLM's defaults."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.drafting.graphs import graph_tokens, verification

SIZES = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]


def settings(k: int, schedule: Any = None, adaptive: bool = False) -> Any:
    return SimpleNamespace(
        num_speculative_tokens=k,
        num_speculative_tokens_per_batch_size=schedule,
        enable_adaptive_verification=adaptive,
    )


@pytest.mark.parametrize(("k", "largest"), [(15, 32), (11, 42), (7, 64)])
def test_as_many_requests_as_the_target_has_graphs_for(k: int, largest: int) -> None:
    """vLLM's own end at 512 tokens, 32 blocks of 16, whatever K is."""
    verified, most = verification(settings(k), 512)
    tokens = graph_tokens(SIZES, verified=verified, rows=16, most_requests=most, most_rows=8192)
    assert tokens[0] == 16
    assert tokens[-1] == 16 * largest
    targets = {-(-size // (k + 1)) for size in SIZES if -(-size // (k + 1)) * (k + 1) <= 512}
    assert tokens == [16 * count for count in sorted(targets)]


@pytest.mark.parametrize("k", [3, 1])
def test_the_largest_graph_is_bounded(k: int) -> None:
    """What a graph's attention keeps grows with its rows."""
    verified, most = verification(settings(k), 512)
    shared = dict(verified=verified, rows=16, most_requests=most, most_rows=8192)
    assert graph_tokens(SIZES, **shared)[-1] == 1024
    assert graph_tokens([*SIZES, 2048], **shared)[-1] == 2048, "vLLM was asked for larger ones"


def test_none_where_vllm_has_no_room_or_the_target_no_graph() -> None:
    shared = dict(verified=8, rows=16, most_requests=64)
    assert graph_tokens([8, 16, 64], **shared, most_rows=100) == [16, 32, 96]
    assert graph_tokens([8, 16, 64], **shared, most_rows=10) == []
    assert graph_tokens([1, 2, 4], **shared, most_rows=100) == []


def test_the_largest_batch_has_a_graph() -> None:
    """Between two of the target's request counts."""
    shared = dict(verified=8, rows=16, most_rows=8192)
    assert graph_tokens([8, 16, 32, 64], **shared, most_requests=6) == [16, 32, 64, 96]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (settings(7), (8, 100)),
        (settings(7, [[1, 8, 7], [9, 32, 3], [33, 512, 0]]), (4, 32)),
        (settings(7, [[1, 8, 0], [9, 32, 3]]), (4, 100)),
        (settings(7, [[1, 512, 0]]), (1, 0)),
        # A gap drafts as the range before it does.
        (settings(7, [[1, 8, 7], [33, 512, 0]]), (8, 32)),
        (settings(7, [[1, 8, 0], [33, 512, 5]]), (6, 100)),
        # No step drafts more than K, or has more requests than there can be.
        (settings(7, [[1, 512, 9]]), (8, 100)),
        (settings(7, [[1, 100, 7], [101, 512, 3]]), (8, 100)),
        (settings(7, adaptive=True), (1, 100)),
    ],
)
def test_the_shortest_verification_and_the_largest_batch_that_drafts(
    given: Any, expected: tuple[int, int]
) -> None:
    assert verification(given, 100) == expected


def test_a_controller_that_cuts_drafts() -> None:
    """More requests fit into a graph of the target's than with whole ones."""
    assert verification(settings(7), 100, cuts=True) == (1, 100)

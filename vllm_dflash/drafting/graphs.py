"""For which request counts the draft has CUDA graphs. Pure.

vLLM captures by tokens: its largest size, 512, is 32 blocks of 16, where the target's graphs for
K = 7 go to 64 requests. The draft's graphs are for the request counts of the target's instead.

    pytest tests/unit/test_draft_graphs.py
"""

from collections.abc import Sequence
from typing import Any

MOST_ROWS = 1024
"""Rows of the largest graph, unless the target's are larger: a draft of more takes longer than its
launches, and a graph's attention keeps float32 of rows x heads x head size for each of its splits,
half a GB here with 32 heads of 128 and 32 splits."""


def graph_tokens(
    sizes: Sequence[int], *, verified: int, rows: int, most_requests: int, most_rows: int
) -> list[int]:
    """The draft's capture sizes, in tokens, ascending.

    Args:
        sizes: the target's, in tokens.
        verified: the tokens a request in the shortest step that verifies drafts.
        rows: b, the draft's tokens a request.
        most_requests: of a step that drafts.
        most_rows: of a draft: what vLLM's buffers hold.
    """
    most = min(most_requests, min(most_rows, max(MOST_ROWS, *sizes)) // rows)
    counts = (-(-size // verified) for size in sizes)
    return sorted({rows * min(n, most) for n in counts if n * verified <= max(sizes)} - {0})


def verification(speculative: Any, max_num_reqs: int, cuts: bool = False) -> tuple[int, int]:
    """By vLLM's ``SpeculativeConfig``, the tokens a request of the shortest step that verifies
    drafts, 1 where drafts are cut, by vLLM on the device or (``cuts``) by our controller; and the
    most requests of a step that drafts."""
    if cuts or speculative.enable_adaptive_verification:
        return 1, max_num_reqs
    most = speculative.num_speculative_tokens
    schedule = speculative.num_speculative_tokens_per_batch_size or [(1, max_num_reqs, most)]
    schedule = sorted(tuple(entry) for entry in schedule)
    # Batches between two ranges, and above the last one, draft as the range before them does.
    ends = [first - 1 for first, _, _ in schedule[1:]] + [max_num_reqs]
    drafting = [
        (min(end, max_num_reqs), min(k, most))
        for (first, _, k), end in zip(schedule, ends, strict=True)
        if k and first <= max_num_reqs
    ]
    return (
        1 + min((k for _, k in drafting), default=0),
        max((end for end, _ in drafting), default=0),
    )

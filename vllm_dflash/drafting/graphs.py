"""For which request counts the draft has CUDA graphs. Pure.

vLLM captures by tokens: its largest size, 512, is 32 blocks of 16, where the target's graphs for
K = 7 go to 64 requests. The draft's graphs are for the request counts of the target's instead.

    pytest tests/unit/test_draft_graphs.py
"""

from collections.abc import Sequence
from typing import Any


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
    most = min(most_requests, most_rows // rows)
    counts = (-(-size // verified) for size in sizes)
    return sorted({rows * min(n, most) for n in counts if n * verified <= max(sizes)} - {0})


def verification(speculative: Any, max_num_reqs: int) -> tuple[int, int]:
    """By vLLM's ``SpeculativeConfig``, the tokens a request of the shortest step that verifies
    drafts, 1 where it cuts drafts on the device; and the most requests of a step that drafts."""
    if speculative.enable_adaptive_verification:
        return 1, max_num_reqs
    schedule = speculative.num_speculative_tokens_per_batch_size
    if not schedule:
        return 1 + speculative.num_speculative_tokens, max_num_reqs
    drafting = [(last, k) for _, last, k in schedule if k]
    # A batch above the last range drafts as that one does.
    most = max_num_reqs if schedule[-1][-1] else max((last for last, _ in drafting), default=0)
    return 1 + min((k for _, k in drafting), default=0), min(most, max_num_reqs)

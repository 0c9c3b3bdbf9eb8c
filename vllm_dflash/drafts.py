"""What goes between a scheduler and a proposer on a CPU: for which requests to draft, and the draft
tokens with what the drafter says of them. Pure.

    pytest tests/unit/test_drafts.py
"""

from collections.abc import Collection, Sequence
from typing import Any


class Planned(int):
    """K of a step that drafts for some of its requests only: a number, as vLLM's
    ``SchedulerOutput.num_spec_tokens_to_schedule`` is one, that brings the others along. Whoever
    knows nothing of them drafts for all."""

    skipped: frozenset[str]

    def __new__(cls, k: int, skipped: Collection[str]) -> "Planned":
        found = super().__new__(cls, k)
        found.skipped = frozenset(skipped)
        return found

    def __reduce__(self) -> Any:
        return Planned, (int(self), self.skipped)


def skipped_of(k: int) -> frozenset[str]:
    """The requests that a step with this K drafts nothing for."""
    return k.skipped if isinstance(k, Planned) else frozenset()


class Drafts(list[list[int]]):
    """Draft token ids [B][K]: a list, as vLLM's ``DraftTokenIds.draft_token_ids`` is one, that
    brings the confidences along."""

    confidences: list[list[float]] | None
    """The probability that the drafter gives each token, [B][K]; None where nobody asked."""

    def __init__(
        self, tokens: Sequence[list[int]], confidences: list[list[float]] | None = None
    ) -> None:
        super().__init__(tokens)
        self.confidences = confidences


def spread(drafts: "Drafts", rows: Sequence[int], count: int) -> "Drafts":
    """``drafts`` of these of ``count`` requests, [B][K] with nothing for the others."""
    said = drafts.confidences
    found: list[list[int]] = [[] for _ in range(count)]
    confidences: list[list[float]] = [[] for _ in range(count)]
    for i, row in enumerate(rows):
        found[row] = drafts[i]
        if said is not None:
            confidences[row] = said[i]
    return Drafts(found, None if said is None else confidences)


def confidences_of(drafts: list[list[int]]) -> list[list[float]] | None:
    """Of a proposer's drafts [B][K] the confidences, [B][K]; None where there are none: on a GPU
    drafts come as plain lists."""
    return drafts.confidences if isinstance(drafts, Drafts) else None

"""What a proposer on a CPU hands to the scheduler: draft tokens, and what the drafter says of them.
Pure."""

from collections.abc import Sequence


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


def confidences_of(drafts: list[list[int]]) -> list[list[float]] | None:
    """Of a proposer's drafts [B][K] the confidences, [B][K]; None where there are none: on a GPU
    drafts come as plain lists."""
    return drafts.confidences if isinstance(drafts, Drafts) else None

"""What is counted of drafts, once for all: tau, and acceptance by position. Pure, standard library
only.

``reference/`` and the tests count for themselves: what checks does not call what it checks.

    pytest tests/unit/test_acceptance.py
"""

from collections.abc import Iterable
from dataclasses import dataclass


def tau(accepted: float, drafts: float) -> float | None:
    """Tokens that the verification of a draft yields: its accepted ones and the target's own; None
    without drafts."""
    return 1 + accepted / drafts if drafts else None


class Positions:
    """Counts of draft tokens by position: only the ends are counted as they come, the rest follows
    from them."""

    def __init__(self, positions: int = 0) -> None:
        """``positions``: those that have a count, of zero, before a draft reached them."""
        self._ends = [0] * (positions + 1)

    @classmethod
    def of(cls, lengths: Iterable[int], positions: int = 0) -> "Positions":
        """The counts of drafts that had, or got right, so many tokens each."""
        counts = cls(positions)
        for length in lengths:
            counts.add(length)
        return counts

    def add(self, length: int, times: int = 1) -> None:
        """``times`` drafts that had, or got right, their first ``length`` tokens."""
        self.reserve(length)
        self._ends[length] += times

    def reserve(self, positions: int) -> None:
        """So many positions have a count, also where no draft reached them."""
        if positions >= len(self._ends):
            self._ends += [0] * (positions + 1 - len(self._ends))

    @property
    def counts(self) -> list[int]:
        """By position, from the first, how many drafts reached as far."""
        left, found = sum(self._ends), []
        for count in self._ends[:-1]:
            left -= count
            found.append(left)
        return found


@dataclass(frozen=True)
class Acceptance:
    """Counts over all drafts, as vLLM counts them."""

    drafts: int
    per_position: list[int]
    """How many drafts had their token at this position accepted."""

    @classmethod
    def of(cls, accepted: Iterable[int], max_draft: int) -> "Acceptance":
        """``accepted``: of each draft, how many of its up to ``max_draft`` tokens were."""
        lengths = list(accepted)
        return cls(len(lengths), Positions.of(lengths, max_draft).counts)

    @property
    def tau(self) -> float:
        """1 where nothing was drafted."""
        return tau(sum(self.per_position), self.drafts) or 1.0

    @property
    def rates(self) -> list[float]:
        """By position, the share of all drafts whose token was accepted."""
        return [count / max(1, self.drafts) for count in self.per_position]

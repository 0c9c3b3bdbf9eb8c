"""Target features of steps that draft nothing, kept until the next draft needs them. Pure.

While nothing is drafted nobody reads the drafter's context, so its keys and values can wait: projected together they cost less than
step by step. What is kept is bounded, and of two rows for the same cache slot (a page that went from one request to another) the
last counts.

    pytest tests/unit/test_pending.py
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch


class PendingContext:
    """Rows whose context K/V are not written yet; at most ``max_rows``."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.num_rows = max_rows, 0
        self._parts: list[tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor]] = []

    def add(self, features: Sequence[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor) -> bool:
        """Keeps a step's rows; whether there is room for as many again.

        Args:
            features: side by side they are [N, T * H].
            positions, slots: [N] int64.
        """
        self._parts.append((features, positions, slots))
        self.num_rows += len(positions)
        return self.num_rows + len(positions) <= self.max_rows

    @property
    def num_steps(self) -> int:
        """Steps whose rows are kept."""
        return len(self._parts)

    def keep_pages(self, pages: Collection[int], page_size: int) -> None:
        """Drops the rows of all other pages."""
        taken = self.take()
        if taken is None:
            return
        features, positions, slots = taken
        rows = torch.from_numpy(np.isin((slots // page_size).numpy(force=True), list(pages)).nonzero()[0]).to(slots.device)
        if len(rows):
            self.add([features[rows]], positions[rows], slots[rows])

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """All that is kept, each slot once; None where there is nothing. Nothing is kept afterwards."""
        kept, self._parts, self.num_rows = self._parts, [], 0
        parts = [(features[0] if len(features) == 1 else torch.cat(features, dim=-1), *rest) for features, *rest in kept]
        if len(parts) < 2:
            return parts[0] if parts else None
        features, positions, slots = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = last_of_each(slots)
        return (features, positions, slots) if rows is None else (features[rows], positions[rows], slots[rows])


def last_of_each(slots: torch.Tensor) -> torch.Tensor | None:
    """Of ``slots`` [N], the rows [M] int64 that no later row repeats, in order; None where all differ. Negative slots do not count."""
    last = {slot: row for row, slot in enumerate(slots.tolist())}
    rows = sorted(row for slot, row in last.items() if slot >= 0)
    return None if len(rows) == len(slots) else torch.tensor(rows, device=slots.device)

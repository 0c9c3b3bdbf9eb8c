"""Target features of steps that draft nothing, kept until the next draft needs them. Pure.

While nothing is drafted nobody reads the drafter's context, so its keys and values can wait:
projected together they cost less than step by step. What is kept lies in buffers that are made, and
written once, before the first step: no step asks the system for memory, or waits for a page of it.
Of two rows for the same cache slot (a page that went from one request to another) the last counts.

    pytest tests/unit/test_pending.py
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch


class PendingContext:
    """Rows [T * H] whose context K/V are not written yet; at most ``max_rows``."""

    def __init__(
        self, max_rows: int, width: int, dtype: torch.dtype, device: "torch.device | str" = "cpu"
    ) -> None:
        """``width``: T * H."""
        self.max_rows, self.num_rows = max_rows, 0
        self._num_steps = 0
        # Ones: a system gives a process its zeros only once they are read or written.
        self._buffers = tuple(
            torch.ones(max_rows, *shape, dtype=each, device=device)
            for shape, each in (((width,), dtype), ((), torch.int64), ((), torch.int64))
        )

    def fits(self, count: int) -> bool:
        """Whether there is room for so many rows more."""
        return self.num_rows + count <= self.max_rows

    def add(
        self, features: Sequence[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Copies a step's rows, for which there has to be room.

        Args:
            features: side by side they are [N, T * H].
            positions, slots: [N] int64.
        """
        first, self.num_rows = self.num_rows, self.num_rows + len(positions)
        kept_features, kept_positions, kept_slots = (
            buffer[first : self.num_rows] for buffer in self._buffers
        )
        torch.cat(list(features), dim=-1, out=kept_features)
        kept_positions.copy_(positions)
        kept_slots.copy_(slots)
        self._num_steps += 1

    def keep_pages(self, pages: Collection[int], page_size: int) -> None:
        """Drops the rows of all other pages."""
        taken = self.take()
        if taken is None:
            return
        wanted = np.isin((taken[2] // page_size).numpy(force=True), list(pages))
        rows = torch.from_numpy(wanted.nonzero()[0]).to(taken[2].device)
        if len(rows):
            features, positions, slots = (column[rows] for column in taken)
            self.add([features], positions, slots)

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """All that is kept, each slot once, good until the next ``add``; None where there is
        nothing. Nothing is kept afterwards."""
        count, num_steps, self.num_rows, self._num_steps = self.num_rows, self._num_steps, 0, 0
        if not count:
            return None
        features, positions, slots = (buffer[:count] for buffer in self._buffers)
        rows = last_of_each(slots) if num_steps > 1 else None
        return (
            (features, positions, slots)
            if rows is None
            else (features[rows], positions[rows], slots[rows])
        )


def last_of_each(slots: torch.Tensor) -> torch.Tensor | None:
    """Of ``slots`` [N], the rows [M] int64 that no later row repeats, in order; None where all
    differ. Negative slots do not count."""
    backwards = slots.numpy(force=True)[::-1]
    values, first = np.unique(backwards, return_index=True)
    rows = np.sort(len(backwards) - 1 - first[values >= 0])
    return None if len(rows) == len(backwards) else torch.from_numpy(rows).to(slots.device)

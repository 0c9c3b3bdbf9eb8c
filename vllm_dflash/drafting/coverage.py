"""Which positions of a request's context hold the drafter's keys and values, and what to do about
those that do not. Pure.

Every target step writes the drafter's context for the rows that it computed, so a request's context
has no hole as long as the proposer ran in each of its steps. This is the watch over that: a step
that starts past the end of what was written has left a hole. The pages with holes are kept by their
number, as the prefix cache may hand them to other requests; a page is sound again once it is filled
anew from its start. Positions from the prefix cache or a KV connector count as valid unless they
lie in such a
page: both carry the draft layers' pages together with the target's.

    pytest tests/unit/test_coverage.py tests/engine/test_context_integrity.py
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Counts:
    """Context positions so far, summed over requests and steps."""

    computed: int = 0
    """Written from target features of this engine's own steps."""
    reused: int = 0
    """Taken over with the pages of the prefix cache or a KV connector."""
    missing: int = 0
    """Holes."""


@dataclass(frozen=True)
class Hole:
    """Positions ``start`` to ``end - 1`` of the batch's request ``row`` have no draft context."""

    row: int
    start: int
    end: int


class ContextCoverage:
    """Follows the written context of every request. Positions in tokens; ``page_size`` in tokens a
    page."""

    def __init__(self, page_size: int) -> None:
        self.page_size, self.counts = page_size, Counts()
        self.bad_pages: set[int] = set()
        self._end: dict[str, int] = {}
        self._batch: list[str] = []
        """Requests of the last step, where each wrote one position."""
        self._next = np.empty(0, dtype=np.int32)
        """Their positions after it; those in ``_end`` lie ``_steps`` behind."""
        self._steps = 0

    def goes_on(self, request_ids: list[str], starts: np.ndarray) -> bool:
        """Takes in a step that writes one position of each request, if it is the same batch as in
        the last step, one position on.

        As most steps are that under load, it costs next to nothing. Where it returns False nothing
        was taken in: ``step`` does that.

        Args:
            starts: int32 [B].
        """
        if self.bad_pages or request_ids != self._batch or starts.tobytes() != self._next.tobytes():
            return False
        self._next += 1
        self._steps += 1
        self.counts.computed += len(request_ids)
        return True

    def step(
        self,
        request_ids: Sequence[str],
        starts: Sequence[int],
        lengths: Sequence[int],
        running: Collection[str],
    ) -> list[Hole]:
        """Takes in a step that writes ``lengths[i]`` positions from ``starts[i]`` on for each
        request of the batch.

        Args:
            running: every request that may come again; what is known of others is dropped now and
                then.

        Returns:
            The holes that were found just now, to be passed to ``add``.
        """
        for request in self._batch if self._steps else ():
            if request in self._end:
                self._end[request] += self._steps
        self._steps, holes, ends = 0, [], self._end
        for row, (request, start, length) in enumerate(
            zip(request_ids, starts, lengths, strict=True)
        ):
            end = ends.get(request)
            if end is None:
                self.counts.reused += start
            elif start > end:
                holes.append(Hole(row, end, start))
                self.counts.missing += start - end
            ends[request] = start + length
        self.counts.computed += sum(lengths)
        is_decode = all(length == 1 for length in lengths)
        self._batch, self._next = (
            (list(request_ids), np.array(starts, dtype=np.int32) + 1)
            if is_decode
            else ([], self._next[:0])
        )
        if len(ends) > 2 * len(running) + 64:
            self._end = {request: end for request, end in ends.items() if request in running}
        return holes

    def forget(self, request_id: str) -> None:
        """Drops what is known of a request that has ended: its id may come again."""
        self._end.pop(request_id, None)

    def add(self, hole: Hole, pages: Sequence[int]) -> None:
        """Marks the pages of a hole; ``pages`` are the request's page numbers from position 0
        on."""
        first, last = hole.start // self.page_size, (hole.end - 1) // self.page_size
        self.bad_pages.update(pages[first : last + 1])

    def first_pages(
        self, block_table: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor | None:
        """From which page on each request's context is sound; None where all are from the start,
        which costs nothing.

        Args:
            block_table: int32 [B, pages] page numbers.
            starts, lengths: the positions that this step writes.

        Returns:
            int64 [B] indices into the request's row of ``block_table``: the page after its last bad
            one, but the anchor's own page at most, whose holes are filled with zeros.
        """
        if not self.bad_pages:
            return None
        first, table = [0] * len(starts), block_table.tolist()
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            own, end = table[row], start + length
            # Pages that this step fills from their first position on are new to the request: what
            # they held is gone.
            fresh = range(-(-start // self.page_size), -(-end // self.page_size))
            self.bad_pages.difference_update(own[i] for i in fresh)
            bad = [i for i in range(-(-end // self.page_size)) if own[i] in self.bad_pages]
            first[row] = min(bad[-1] + 1, end // self.page_size) if bad else 0
        return torch.tensor(first, device=block_table.device)


def without_first_pages(block_table: torch.Tensor, first_pages: torch.Tensor) -> torch.Tensor:
    """Each row of ``block_table`` [B, pages] from its ``first_pages`` [B] on; the rest of the row
    repeats the last entry."""
    columns = torch.arange(block_table.shape[1], device=block_table.device) + first_pages[:, None]
    return block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1))

"""The watch over the draft context that the V1 proposer writes: what each step has written, and
what is done about a hole. The reckoning itself is ``coverage.py``'s.

    pytest tests/unit/test_coverage.py tests/engine/test_context_integrity.py
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dflash.drafting.coverage import ContextCoverage, Hole
from vllm_dflash.drafting.layout import paged_slots
from vllm_dflash.log import logger

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer

_logger = init_logger(logger.name)


class ContextWatch:
    """Follows one proposer's steps, through the requests of its runner."""

    def __init__(self, proposer: "DFlashProposer") -> None:
        self.proposer = proposer
        self._coverage: ContextCoverage | None = None
        self._known: WeakValueDictionary[str, Any] = WeakValueDictionary()
        """The runner's requests that were in a step, by id."""

    @property
    def coverage(self) -> ContextCoverage:
        """Which context positions hold draft K/V; made late, as vLLM sets the page size after the
        proposer is built."""
        if self._coverage is None:
            self._coverage = ContextCoverage(self.proposer.page_size)
        return self._coverage

    def goes_on(self, num_reqs: int) -> bool:
        """Takes in a step that writes one position of each request; see
        ``ContextCoverage.goes_on``."""
        batch = self.proposer.runner.input_batch
        return self.coverage.goes_on(batch.req_ids, batch.num_computed_tokens_cpu[:num_reqs])

    def written(
        self, cad: CommonAttentionMetadata, num_rejected: torch.Tensor | None
    ) -> tuple[list[int], list[int]]:
        """Of each request the first position that this step computed, and how many were committed.

        On a GPU the host does not wait for the rejected, and they are counted too.
        """
        count = cad.num_reqs
        starts = self.proposer.runner.input_batch.num_computed_tokens_cpu[:count].tolist()
        if cad.num_actual_tokens == count:
            return starts, [1] * count
        bounds = cad.query_start_loc_cpu[: count + 1].tolist()
        rejected = self.proposer.backend.lost_rows(num_rejected, count)
        return starts, [
            end - begin - lost
            for begin, end, lost in zip(bounds, bounds[1:], rejected, strict=False)
        ]

    def note(
        self, cad: CommonAttentionMetadata, starts: list[int], lengths: list[int]
    ) -> torch.Tensor | None:
        """Notes what this step has written; returns [B] int64 first sound pages where some
        request's context has a hole."""
        runner = self.proposer.runner
        request_ids = runner.input_batch.req_ids[: cad.num_reqs]
        for request_id in request_ids:
            request = runner.requests[request_id]
            if self._known.get(request_id) is not request:
                # Another one, with the id of one that has ended.
                self.coverage.forget(request_id)
                self._known[request_id] = request
        # Where the rejected are counted as written, a hole shorter than a block goes unnoticed.
        for hole in self.coverage.step(request_ids, starts, lengths, runner.requests):
            table = cad.block_table_tensor[hole.row]
            _logger.warning_once(
                "the drafter's context of a request has a hole (positions %d to %d): a step ran"
                " without the drafter. It is left out of what the drafter attends to, and counted",
                hole.start,
                hole.end - 1,
            )
            self.coverage.add(hole, table.tolist())
            self.proposer.context.flush()
            self._fill_with_zeros(hole, table)
        return self.coverage.first_pages(cad.block_table_tensor, starts, lengths)

    def _fill_with_zeros(self, hole: Hole, table: torch.Tensor) -> None:
        """Zeros for the hole's keys and values, so that a page that is still in use holds nothing
        of another request."""
        positions = torch.arange(hole.start, hole.end, device=table.device)
        self.proposer.model.store_zeros(
            paged_slots(table[None], positions[None], self.proposer.page_size)[0]
        )

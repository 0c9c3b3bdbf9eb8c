"""Where a step's target features go: into the draft layers' KV cache at once, or kept until something is drafted.

Limits: under vLLM's V1 runner; what is kept is never read by a KV connector, so with one everything is written at once.

    pytest tests/engine/test_context_integrity.py tests/engine/test_adaptive.py
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_dflash.adaptive.acceptance import row_step
from vllm_dflash.checks import settled
from vllm_dflash.drafting.pending import PendingContext
from vllm_dflash.models.drafter import DrafterForCausalLM

if TYPE_CHECKING:
    from vllm_dflash.models.eager_draft import EagerContext

_PENDING_ROWS = 1024
"""Rows of target features, [T * H] each, that may wait for the next draft where all of them will be written."""
_PENDING_BYTES = 64 << 20
"""The same where pages of requests that have ended are never read again, so that most rows never have to be written."""
_CHUNK_ROWS = 512
"""Rows that a CPU projects at once: what it computes in between stays in its caches."""


class ContextStore:
    """Writes context rows: features [N, T * H], positions [N] int64, cache slots [N] int64 (-1: not to be written)."""

    model: DrafterForCausalLM
    """Set once it is loaded."""
    eager: "EagerContext | None" = None
    """What projects and writes in its place, on a CPU."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, live_pages: Callable[[], tuple[set[int], int] | None]) -> None:
        """``live_pages``: pages of the requests that run and slots a page; None where slots are counted by other pages than vLLM's."""
        speculative = vllm_config.speculative_config
        assert speculative is not None
        drafter, dtype = settled(speculative.draft_model_config.hf_config), vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        width = drafter.num_features * drafter.hidden_size
        self._reads_ended = vllm_config.cache_config.enable_prefix_caching
        max_rows = _PENDING_ROWS if self._reads_ended else max(_PENDING_BYTES // (width * dtype.itemsize), _PENDING_ROWS)
        self._pending = PendingContext(max_rows, width, dtype, device)
        # A connector, and a copy for part of a page, read pages between steps: there they have to be whole after every step.
        self.may_wait = vllm_config.kv_transfer_config is None and vllm_config.cache_config.prefix_match_unit is None
        self._live_pages, self._on_cpu = live_pages, device.type == "cpu"

    def write(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Writes these rows, after those that were kept."""
        self.flush()
        self._project(features, positions, slots)

    def keep(self, features: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        """Keeps copies of these rows until ``write`` or ``flush``; ``features`` side by side are [N, T * H]."""
        count = len(positions)
        if not self._pending.fits(count):
            self._drop_ended()
            if 2 * (self._pending.num_rows + count) > self._pending.max_rows:
                self._write_kept()
        if self._pending.fits(count):
            self._pending.add(features, positions, slots)
        else:
            self._project(torch.cat(list(features), dim=-1), positions, slots)

    def flush(self) -> None:
        """Writes what was kept."""
        if self._pending.num_rows:
            self._drop_ended()
            self._write_kept()

    def _write_kept(self) -> None:
        taken = self._pending.take()
        if taken is not None:
            self._project(*taken)

    def _drop_ended(self) -> None:
        """Drops kept rows of requests that have ended, where nobody will read them."""
        live = None if self._reads_ended else self._live_pages()
        if live is not None:
            self._pending.keep_pages(*live)

    def _project(self, *rows: Tensor) -> None:
        if not self._on_cpu:
            self._write(*rows)
            return
        for chunk in zip(*(column.split(_CHUNK_ROWS) for column in rows), strict=True):
            self._write(*map(_padded, chunk))

    def _write(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        if self.eager is None:
            self.model.precompute_and_store_context_kv(self.model.combine_hidden_states(features), positions, slots)
        else:
            self.model.check_features(features)
            self.eager(features, positions, slots)


def _padded(rows: Tensor) -> Tensor:
    """``rows`` [N, ...] and the last one again up to a round number: a CPU's kernels are made anew for each number of rows."""
    missing = -len(rows) % row_step(len(rows))
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows

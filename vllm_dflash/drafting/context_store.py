"""Where a step's target features go: into the draft layers' KV cache at once, or kept until
something is drafted.

Limits: under vLLM's V1 runner; what is kept is never read by a KV connector, so with one everything
is written at once.

    pytest tests/engine/test_context_integrity.py tests/engine/test_adaptive.py
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_dflash.checks import drafter_config
from vllm_dflash.drafting.pending import PendingContext

WriteRows: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]
"""Projects context rows and writes them: features [N, T * H], positions [N] int64, cache slots [N]
int64 (-1: not to be written)."""

_PENDING_ROWS = 1024
"""Rows of target features, [T * H] each, that may wait for the next draft where all of them will be
written."""
_PENDING_BYTES = 64 << 20
"""The same where pages of requests that have ended are never read again, so that most rows never
have to be written."""


class ContextStore:
    """Writes context rows: features [N, T * H], positions [N] int64, cache slots [N] int64 (-1: not
    to be written)."""

    write_rows: WriteRows
    """Set once the drafter is loaded."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        live_pages: Callable[[], tuple[set[int], int] | None],
    ) -> None:
        """``live_pages``: pages of the requests that run and slots a page; None where slots are
        counted by other pages than vLLM's."""
        speculative = vllm_config.speculative_config
        assert speculative is not None
        drafter, dtype = (
            drafter_config(speculative.draft_model_config.hf_config),
            vllm_config.model_config.dtype,
        )
        assert isinstance(dtype, torch.dtype)
        width = drafter.num_features * drafter.hidden_size
        self._reads_ended = vllm_config.cache_config.enable_prefix_caching
        max_rows = (
            _PENDING_ROWS
            if self._reads_ended
            else max(_PENDING_BYTES // (width * dtype.itemsize), _PENDING_ROWS)
        )
        self._pending = PendingContext(max_rows, width, dtype, device)
        # A connector, and a copy for part of a page, read pages between steps: there they have to
        # be whole after every step.
        self.may_wait = (
            vllm_config.kv_transfer_config is None
            and vllm_config.cache_config.prefix_match_unit is None
        )
        self._live_pages = live_pages

    def write(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Writes these rows, after those that were kept."""
        self.flush()
        self.write_rows(features, positions, slots)

    def keep(self, features: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        """Keeps copies of these rows until ``write`` or ``flush``; ``features`` side by side are
        [N, T * H]."""
        count = len(positions)
        if not self._pending.fits(count):
            self._drop_ended()
            if 2 * (self._pending.num_rows + count) > self._pending.max_rows:
                self._write_kept()
        if self._pending.fits(count):
            self._pending.add(features, positions, slots)
        else:
            self.write_rows(torch.cat(list(features), dim=-1), positions, slots)

    def flush(self) -> None:
        """Writes what was kept."""
        if self._pending.num_rows:
            self._drop_ended()
            self._write_kept()

    def _write_kept(self) -> None:
        taken = self._pending.take()
        if taken is not None:
            self.write_rows(*taken)

    def _drop_ended(self) -> None:
        """Drops kept rows of requests that have ended, where nobody will read them."""
        live = None if self._reads_ended else self._live_pages()
        if live is not None:
            self._pending.keep_pages(*live)

"""vLLM's ``ExampleHiddenStatesConnector`` that also works on a CPU, where it would look for CUDA
streams.

Loaded by an engine through ``kv_connector_module_path``; may go once upstream's runs without CUDA.
Tests: ``pytest tests/engine/test_train_extract.py``.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as upstream


class _Copied:
    """Stands for a CUDA event that is over."""

    def query(self) -> bool:
        return True


class HiddenStates(upstream.ExampleHiddenStatesConnector):
    """Writes a finished request's hidden states [S, T, H] before its step ends, where they are in
    the machine's own memory."""

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache is None or self._kv_cache.is_cuda:
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = upstream.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        save_file(
            {"hidden_states": states.contiguous(), "token_ids": pending.token_ids}, pending.filename
        )
        if pending.req_id in self._lock_fds:
            os.close(self._lock_fds.pop(pending.req_id))
        self._req_copy_events[pending.req_id] = _Copied()

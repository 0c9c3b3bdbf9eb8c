"""The DFlash speculator for vLLM's V2 model runner: vLLM's own, with its block kept inside ``max_model_len``.

The draft model is ours because it is registered over the architecture's name, so vLLM's loader finds it; nothing of the
loading is repeated here. A step that schedules fewer than ``num_speculative_tokens`` drafts still drafts the whole block,
and the model runner cuts the rest: the tokens that stay are the same.
Limits: text only, and one pipeline stage, as the drafter takes the target's embedding.

    pytest tests/engine/test_v2.py
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator as NativeDFlashSpeculator

from vllm_dflash.checks import settled
from vllm_dflash.conditioning import kind_of


class DFlashSpeculator(NativeDFlashSpeculator):
    """Drafts blocks as vLLM's speculator does; query rows past ``max_model_len`` write no K/V."""

    _speculator_name = "vllm-dflash"

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        drafter = settled(self.draft_model_config.hf_config)
        width = kind_of(drafter).context_width(drafter)
        # vLLM's buffer holds one hidden state a token; DFlare's context has one a draft layer.
        self.hidden_states = torch.zeros(self.max_num_tokens, width, dtype=self.dtype, device=device)

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Drafts ``num_reqs`` blocks into ``draft_tokens``.

        A full CUDA graph records this call, the padding below with it: it works on vLLM's persistent buffers, in place, and
        asks the device for nothing. ``slot_mappings`` is None in memory profiling, when there is no KV cache yet.
        """
        if slot_mappings is not None:
            num_queries = num_reqs * self.num_query_per_req
            for group_id in self.draft_kv_cache_group_ids:
                pad_overflowing_slots(
                    self.block_tables.slot_mappings[group_id, :num_queries].view(num_reqs, self.num_query_per_req),
                    self.sample_pos[: num_reqs * self.num_speculative_steps].view(num_reqs, self.num_speculative_steps),
                    self.max_model_len,
                )
        super()._generate_draft(num_reqs, num_tokens_padded, attn_metadata, slot_mappings, *args, **kwargs)


def pad_overflowing_slots(query_slots: torch.Tensor, sample_positions: torch.Tensor, max_model_len: int) -> None:
    """Sets to ``PAD_SLOT_ID``, in place, the slot of every query whose position is ``max_model_len`` or more.

    vLLM looks such a position's slot up in the request's last block, where it is the slot of a position that the same
    request holds: its K/V, target context or query, would be overwritten before the block is attended to.

    Args:
        query_slots: int64 ``[num_reqs, 1 + K]``, a view of the slots of each request's anchor and K masks.
        sample_positions: int64 ``[num_reqs, K]``, the masks' positions, not clamped; 0 in a graph's padding rows.
        max_model_len: in tokens.
    """
    # The anchor needs no look: vLLM's scheduler keeps one position free for it.
    query_slots[:, 1:].masked_fill_(sample_positions >= max_model_len, PAD_SLOT_ID)

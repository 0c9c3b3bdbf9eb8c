"""The DFlash speculator for vLLM's V2 model runner: vLLM's own, with its block kept inside
``max_model_len``.

The draft model is ours because it is registered over the architecture's name, so vLLM's loader
finds it; nothing of the loading is repeated here. A step that schedules fewer than
``num_speculative_tokens`` drafts still drafts the whole block, and the model runner cuts the rest:
the tokens that stay are the same.
Limits: text only, and one pipeline stage, as the drafter takes the target's embedding.

    pytest tests/engine/test_v2.py tests/engine/test_v2_formats.py tests/engine/test_v2_features.py
"""

import copy
from math import prod
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import (
    DFlashSpeculator as NativeDFlashSpeculator,
)

from vllm_dflash.checks import drafter_config
from vllm_dflash.config import DrafterConfigError
from vllm_dflash.drafting.layout import end_blocks_at
from vllm_dflash.heads import Draft, Ranking
from vllm_dflash.kinds import AFTER_ANCHOR, kind_of
from vllm_dflash.metrics.drafter import attach as record_drafter


def _best(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class DFlashSpeculator(NativeDFlashSpeculator):
    """Drafts blocks as vLLM's speculator does; a block that would reach past ``max_model_len`` is
    moved to end there."""

    _speculator_name = "vllm-dflash"
    _draft: "Draft | None" = None
    """What drafts, where it is not the best token of each row."""
    coverage = None
    """Known with the V1 runner only: here no step is without ``propose``."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        assert speculative is not None
        drafter = drafter_config(speculative.draft_model_config.hf_config)
        self.num_draft_tokens = speculative.num_speculative_tokens
        # The block is drafted whole, whatever K is: vLLM's own class takes its length from the
        # config.
        whole, block = copy.copy(vllm_config), copy.copy(speculative)
        block.num_speculative_tokens = drafter.max_speculative_tokens
        whole.speculative_config = block
        super().__init__(whole, device)
        self._first_row = drafter.first_row
        # Of a row's token: a row predicts its own position's or the next one's.
        self._tokens_end = self.max_model_len + AFTER_ANCHOR - self._first_row
        if not self._first_row:
            # The anchor's row predicts too: as many rows as tokens.
            self.sample_from_anchor = True
            self.num_query_per_req = self.num_speculative_steps
        width = kind_of(drafter).context.width(drafter)
        # vLLM's buffer holds one hidden state a token, a context may be wider.
        self.hidden_states = torch.zeros(
            self.max_num_tokens, width, dtype=self.dtype, device=device
        )
        self._before: torch.Tensor | None = None
        """[requests, C]: of each the context of the token before its anchor, for a head over the
        block."""
        if kind_of(drafter).head.over_block:
            self._before = torch.zeros(self.max_num_reqs, width, dtype=self.dtype, device=device)
            # Where a full CUDA graph takes the context in, vLLM 0.33 stages the counts here.
            self._num_rejected = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        record_drafter(self, vllm_config, device)

    def load_draft_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the loaded drafter."""
        model = super().load_draft_model(*args, **kwargs)
        if not kind_of(model.drafter_config).head.is_argmax:
            logits = model.compute_logits
            self._draft, self._ranking = (
                model.drafting(),
                Ranking(
                    logits,
                    _best,
                    lambda hidden: _best(logits(hidden)),
                    confident=False,
                    embed=model.embed_candidates,
                ),
            )
        return model

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Takes over the KV cache's groups and the attention groups.

        Raises:
            DrafterConfigError: draft layers of one KV cache group differ in causality, which vLLM
                keeps by group.
        """
        super().set_attn(*args, **kwargs)
        causal = dict(
            zip(
                self.model.get_draft_kv_cache_layer_names(),
                self.model.get_draft_attn_causal(),
                strict=True,
            )
        )
        for group in self.kv_cache_config.kv_cache_groups:
            if len({causal[name] for name in group.layer_names if name in causal}) > 1:
                raise DrafterConfigError(
                    "the drafter's causal sliding layers and its full ones came into one KV cache"
                    " group: start vLLM without --disable-hybrid-kv-cache-manager, and without a KV"
                    " connector that turns that manager off"
                )

    def prepare_context_anchor(self, *args: Any) -> None:
        """Keeps the context of each request's last committed token, in place.

        Args:
            args: of vLLM 0.32 the batch, of 0.33 the number of requests and where each one's rows
                begin [B + 1] int32; and how many of them were rejected [B] int32.
        """
        if self._before is None:
            return
        *batch, num_rejected = args
        if len(batch) == 1:
            batch = [batch[0].num_reqs, batch[0].query_start_loc]
        count, starts = batch
        ends = starts[1 : count + 1] - num_rejected[:count]
        self._before[:count] = self.hidden_states[(ends - 1).clamp(min=0).long()]

    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As vLLM's; of each block the first ``num_speculative_tokens`` tokens, [num_reqs, K]."""
        return super().propose(*args, **kwargs)[:, : self.num_draft_tokens]

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

        A full CUDA graph records this call, the moving below with it: it works on vLLM's persistent
        buffers, in place, and asks the device for nothing. ``slot_mappings`` is None in memory
        profiling, when there is no KV cache yet.
        """
        draft = self._draft
        anchors = None if draft is None else self._anchors(num_reqs)
        if slot_mappings is not None:
            queries, samples = (
                (num_reqs, self.num_query_per_req),
                (num_reqs, self.num_speculative_steps),
            )
            num_queries, num_samples = prod(queries), prod(samples)
            end_blocks_at(
                self._tokens_end,
                last_positions=self.sample_pos[:num_samples].view(samples)[:, -1:],
                rows=[
                    buffer[:num_queries].view(queries)
                    for buffer in (self.input_buffers.input_ids, self.input_buffers.positions)
                ],
                slots=[
                    self.block_tables.slot_mappings[group, :num_queries].view(queries)
                    for group in self.draft_kv_cache_group_ids
                ],
                sample_indices=self.sample_indices[:num_samples].view(samples),
                first_row=self._first_row,
            )
        if draft is None or anchors is None:
            super()._generate_draft(
                num_reqs, num_tokens_padded, attn_metadata, slot_mappings, *args, **kwargs
            )
            return
        rows = self.sample_indices[: num_reqs * self.num_speculative_steps]
        hidden = self._run_model(num_tokens_padded, attn_metadata, slot_mappings, *args, **kwargs)
        ranking = self._ranking
        if self._before is not None:
            ranking = ranking._replace(before=self._before[:num_reqs])
        tokens, _ = draft(hidden[rows], anchors, self.num_speculative_steps, ranking)
        self.draft_tokens[:num_reqs] = tokens

    def _anchors(self, num_reqs: int) -> torch.Tensor:
        """Each request's anchor [num_reqs], of its block's first row; a copy, for blocks may be
        moved."""
        first = self.input_buffers.input_ids[: num_reqs * self.num_query_per_req]
        return first[:: self.num_query_per_req].clone()

"""Our proposer for vLLM's V1 model runner: one drafter forward a step for the whole batch.

Inherits from vLLM's ``DFlashProposer`` what is vLLM's business (loading, sharing the target's embedding and
lm_head, attention groups, CUDA-graph dispatch) and replaces the draft itself. It stands in its place through
``vllm_dflash.patches.v1_proposer``. Limits: draft layers in one KV cache group; no M-RoPE positions.

    pytest tests/engine/test_draft_parity.py
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer as NativeDFlashProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_dflash.config import DrafterConfigError
from vllm_dflash.drafting.coverage import ContextCoverage, Hole, without_first_pages
from vllm_dflash.drafting.layout import PAD_SLOT_ID, BlockLayout, block_layout
from vllm_dflash.models.drafter import DrafterForCausalLM

# A name below "vllm", so that vLLM's own handlers and format apply.
_logger = init_logger("vllm.plugins.dflash")


class DFlashProposer(NativeDFlashProposer):
    """Drafts up to ``block_size - 1`` tokens a request and keeps the drafter's context K/V up to date."""

    model: DrafterForCausalLM

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise DrafterConfigError(
                "the drafter shares the target's embedding, which another pipeline stage holds: set pipeline_parallel_size to 1"
            )
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self._coverage: ContextCoverage | None = None

    @property
    def coverage(self) -> ContextCoverage:
        """Which context positions hold draft K/V; made late, as vLLM sets the page size after the proposer is built."""
        if self._coverage is None:
            self._coverage = ContextCoverage(self.block_size)
        return self._coverage

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Stores the new context, then drafts.

        Args:
            num_speculative_tokens: K of this step; 0 stores the context and drafts nothing.
            target_positions: [N] int64 positions of the target's N rows.
            target_hidden_states: [N, T * H] captured features of those rows.
            next_token_ids: [B] int32, the anchors.
            common_attn_metadata: the target step's metadata in the draft layers' KV cache group.
            num_rejected_tokens_gpu: [B] int32 rejected tokens at the end of each request's rows, or None.

        Returns:
            Draft token ids [B, K] int64.
        """
        self._last_draft_probs = None
        cad, k = common_attn_metadata, num_speculative_tokens
        layout = block_layout(
            next_token_ids=next_token_ids,
            query_start_loc=cad.query_start_loc,
            seq_lens=cad.seq_lens,
            num_rejected=num_rejected_tokens_gpu,
            block_table=cad.block_table_tensor,
            slot_mapping=cad.slot_mapping[: target_hidden_states.shape[0]],
            page_size=self.block_size,
            mask_token_id=self.parallel_drafting_token_id,
            num_speculative_tokens=k,
            max_model_len=self.max_model_len,
        )
        context = self.model.combine_hidden_states(target_hidden_states)
        self.model.precompute_and_store_context_kv(context, target_positions, layout.context_slot_mapping)
        first_pages = self._watch(cad, num_rejected_tokens_gpu)
        if k == 0:
            return torch.empty(cad.num_reqs, 0, dtype=torch.int64, device=self.device)
        hidden_states = self._run_block(layout, cad, k, first_pages)
        tokens, probs = self._sample_draft_tokens(hidden_states[layout.sample_indices], sampling_metadata)
        if probs is not None:
            self._last_draft_probs = probs.view(-1, k, probs.shape[-1]).contiguous()
        return tokens.view(-1, k)

    def _run_block(self, layout: BlockLayout, cad: CommonAttentionMetadata, k: int, first_pages: torch.Tensor | None) -> torch.Tensor:
        """Runs the drafter over the block's queries; returns hidden states [B * (K + 1) or more, H]."""
        num_tokens = layout.input_ids.shape[0]
        mode, num_input_tokens, num_tokens_across_dp = self._determine_batch_execution_and_padding(num_tokens)
        self.input_ids[:num_tokens] = layout.input_ids
        self.positions[:num_tokens] = layout.positions
        self._slot_mapping_buffer[:num_tokens] = layout.slot_mapping
        self._slot_mapping_buffer[num_tokens:num_input_tokens] = PAD_SLOT_ID
        if first_pages is not None:
            cad = cad.replace(block_table_tensor=without_first_pages(cad.block_table_tensor, first_pages))
            layout = replace(layout, seq_lens=(layout.seq_lens - first_pages * self.block_size).to(layout.seq_lens.dtype))
        metadata = self._layer_metadata(layout, cad, k)
        slots = self._slot_mapping_buffer[:num_input_tokens]
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_input_tokens,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            return self.model(input_ids=self.input_ids[:num_input_tokens], positions=self.positions[:num_input_tokens])

    def _watch(self, cad: CommonAttentionMetadata, num_rejected: torch.Tensor | None) -> torch.Tensor | None:
        """Notes what this step has written; returns [B] int64 first sound pages where some request's context has a hole."""
        batch, count = self.runner.input_batch, cad.num_reqs
        starts = batch.num_computed_tokens_cpu[:count].tolist()
        lengths = (cad.query_start_loc_cpu[1 : count + 1] - cad.query_start_loc_cpu[:count]).tolist()
        if num_rejected is not None and num_rejected.device.type == "cpu":
            lengths = [length - rejected for length, rejected in zip(lengths, num_rejected.tolist(), strict=True)]
        # On a GPU the host does not wait for the rejected: a hole shorter than a block goes unnoticed there.
        for hole in self.coverage.step(batch.req_ids[:count], starts, lengths, self.runner.requests):
            table = cad.block_table_tensor[hole.row]
            _logger.warning_once(
                "the drafter's context of a request has a hole (positions %d to %d): a step ran without the drafter. "
                "It is left out of what the drafter attends to, and counted", hole.start, hole.end - 1,
            )  # fmt: skip
            self.coverage.add(hole, table.tolist())
            self._fill_with_zeros(hole, table)
        return self.coverage.first_pages(cad.block_table_tensor, starts, lengths)

    def _fill_with_zeros(self, hole: Hole, table: torch.Tensor) -> None:
        """Zeros for the hole's keys and values, so that a page that is still in use holds nothing of another request."""
        positions = torch.arange(hole.start, hole.end, device=table.device)
        self.model.store_zeros(table[positions // self.block_size].long() * self.block_size + positions % self.block_size)

    def _layer_metadata(self, layout: BlockLayout, cad: CommonAttentionMetadata, k: int) -> dict[str, Any]:
        """Attention metadata by draft layer; layers differ only in whether a query sees later ones of its block."""
        causal = dict(zip(self.model.get_draft_kv_cache_layer_names(), self.model.get_draft_attn_causal(), strict=True))
        built = {}
        for flag in sorted(set(causal.values())):
            # Past vLLM's DFlashProposer, which asserts that no layer is causal.
            _, by_layer = SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata(self, self._block_metadata(layout, cad, k, flag))
            built[flag] = by_layer
            for name, metadata in by_layer.items():
                if getattr(metadata, "causal", None) is not flag:
                    raise DrafterConfigError(
                        f"the attention backend of {name} cannot attend {'causally' if flag else 'to both sides'}: "
                        "choose another with attention_backend in the speculative config, such as FLASH_ATTN"
                    )
        return {name: built[flag][name] for name, flag in causal.items()}

    def _block_metadata(self, layout: BlockLayout, cad: CommonAttentionMetadata, k: int, causal: bool) -> CommonAttentionMetadata:
        """Attention metadata of the block: K + 1 queries a request."""
        upper_bound = cad.seq_lens_cpu_upper_bound
        return CommonAttentionMetadata(
            query_start_loc=self.arange[: cad.num_reqs + 1] * (k + 1),
            query_start_loc_cpu=torch.arange(cad.num_reqs + 1, dtype=torch.int32) * (k + 1),
            seq_lens=layout.seq_lens,
            # An upper bound may count rejected tokens; it only sizes work.
            seq_lens_cpu_upper_bound=None if upper_bound is None else (upper_bound + k + 1).clamp(max=self.max_model_len),
            num_reqs=cad.num_reqs,
            num_actual_tokens=layout.input_ids.shape[0],
            max_query_len=k + 1,
            max_seq_len=min(cad.max_seq_len + k + 1, self.max_model_len),
            block_table_tensor=cad.block_table_tensor,
            slot_mapping=layout.slot_mapping,
            causal=causal,
        )


def context_counts(worker: Any) -> dict[str, int]:
    """Context positions that a worker's drafter has computed, taken over and missed: ``llm.collective_rpc(context_counts)``."""
    return dict(vars(worker.model_runner.drafter.coverage.counts))

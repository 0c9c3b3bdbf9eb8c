"""Our proposer for vLLM's V1 model runner: one drafter forward a step for the whole batch.

Inherits from vLLM's ``DFlashProposer`` what is vLLM's business (loading, sharing the target's
embedding and lm_head, attention groups, CUDA-graph dispatch) and replaces the draft itself. It
stands in its place through ``vllm_dflash.patches.v1_proposer``. Limits: draft layers in one KV
cache group; no M-RoPE positions.

    pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer as NativeDFlashProposer

from vllm_dflash.checks import check_logits_processors, drafter_config
from vllm_dflash.drafting.backend import Backend
from vllm_dflash.drafting.context_store import ContextStore
from vllm_dflash.drafting.coverage import ContextCoverage, without_first_pages
from vllm_dflash.drafting.layout import PAD_SLOT_ID, BlockLayout, block_layout
from vllm_dflash.drafting.metadata import layer_metadata
from vllm_dflash.drafting.watch import ContextWatch
from vllm_dflash.drafts import Drafts, skipped_of, spread
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.heads import Draft
from vllm_dflash.kinds import kind_of
from vllm_dflash.metrics.drafter import attach as record_drafter
from vllm_dflash.metrics.recorder import touch_here
from vllm_dflash.models.drafter import DrafterForCausalLM


class DFlashProposer(NativeDFlashProposer):
    """Drafts up to ``max_speculative_tokens`` a request and keeps the drafter's context K/V up to
    date."""

    model: DrafterForCausalLM
    _draft: Draft

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise DrafterConfigError(
                "the drafter shares the target's embedding, which another pipeline stage holds: set"
                " pipeline_parallel_size to 1"
            )
        check_logits_processors()
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.watch = ContextWatch(self)
        # The whole block, whatever K is; vLLM's buffers hold K + 1 queries a request.
        drafter = drafter_config(self.draft_model_config.hf_config)
        self.draft_block_size, self._first_row = drafter.block_size, drafter.first_row
        self._whole_rows = (
            drafter.max_speculative_tokens if kind_of(drafter).head.over_block else None
        )
        """Rows that are ranked whatever K is; None: K."""
        size = max(self.max_batch_size * self.draft_block_size, self.max_padded_query_tokens)
        self._query_ids = torch.zeros(size, dtype=torch.int32, device=device)
        self.positions, self._slot_mapping_buffer = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.is_measured = False
        """Whether dummy runs of the target leave the drafter out."""
        self._causal: dict[str, bool] = {}
        """By draft layer, whether a query sees no later ones of its block."""
        self.context = ContextStore(vllm_config, device, self._live_pages)
        self.backend = _backend(self, device)
        record_drafter(self, vllm_config, device)

    def load_model(self, target_model: Any) -> None:
        """Loads the drafter; the backend then takes it, and on a CPU verifies drafts from then
        on."""
        super().load_model(target_model)
        self._causal = dict(
            zip(
                self.model.get_draft_kv_cache_layer_names(),
                self.model.get_draft_attn_causal(),
                strict=True,
            )
        )
        self.backend.load(target_model)
        self.context.write_rows = self.backend.write_context
        self._draft = self.model.drafting()
        touch_here()  # which drafter serves is known from now on

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        if not self.is_measured:
            super().dummy_run(*args, **kwargs)

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's: each request's anchor [B] int32, and how many of ``sampled_token_ids`` [B, n]
        (-1: rejected) it keeps [B] int32."""
        native = super().prepare_next_token_ids_padded
        return self.backend.next_token_ids(
            native, sampled_token_ids, discard_request_mask, requests, gpu_input_batch
        )

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: Any,
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, torch.Tensor | None, torch.Tensor | None]:
        """As vLLM's: the step's metadata, nothing that we need, and each request's rejected tokens
        [B] int32, or None for none."""
        native = super().prepare_inputs_padded
        return self.backend.rejected(
            native, common_attn_metadata, spec_decode_metadata, valid_sampled_tokens_count
        )

    def validate_same_kv_cache_group(self, kv_cache_config: Any) -> None:
        """As vLLM's, which has one group's metadata for all draft layers; with what to do.

        Raises:
            DrafterConfigError: the draft layers stand in several KV cache groups.
        """
        groups = [set(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        if sum(bool(group & self._draft_attn_layer_names) for group in groups) != 1:
            raise DrafterConfigError(
                "the drafter's layers came into several KV cache groups, and vLLM's V1 runner has"
                " one for them",
                "start vLLM with --disable-hybrid-kv-cache-manager, or with"
                " VLLM_USE_V2_MODEL_RUNNER=1",
            )
        # Groups share their memory: a page of the drafter's that is given back may be one of the
        # target's layers by the time that features which waited would be written.
        self.context.may_wait &= len(groups) == 1

    @property
    def page_size(self) -> int:
        """Tokens a page of the draft layers' KV cache, which vLLM calls ``block_size``."""
        return self.block_size

    @property
    def coverage(self) -> ContextCoverage:
        """Which context positions hold draft K/V."""
        return self.watch.coverage

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
    ) -> "torch.Tensor | Drafts":
        """Stores the new context, then drafts.

        Args:
            num_speculative_tokens: K of this step; 0 stores the context and drafts nothing.
            target_positions: [N] int64 positions of the target's N rows.
            target_hidden_states: [N, T * H] captured features of those rows.
            next_token_ids: [B] int32, the anchors.
            common_attn_metadata: the target step's metadata in the draft layers' KV cache group.
            num_rejected_tokens_gpu: [B] int32 rejected tokens at the end of each request's rows, or
                None.

        Returns:
            Draft token ids [B, K] int64; on a CPU as a list, with confidences where the scheduler
            asks for them.
        """
        self._last_draft_probs = None
        cad, k = common_attn_metadata, num_speculative_tokens
        starts, lengths = self.watch.written(cad, num_rejected_tokens_gpu)
        self._store_context(
            cad,
            target_hidden_states,
            target_positions,
            lengths,
            num_rejected_tokens_gpu,
            later=k == 0,
        )
        first_pages = self.watch.note(cad, starts, lengths)
        if k == 0:
            return self.backend.hand_out(
                torch.empty(cad.num_reqs, 0, dtype=torch.int64, device=self.device), None
            )
        before = None
        if self._whole_rows is not None:
            ends = cad.query_start_loc[1 : cad.num_reqs + 1].long() - 1
            if num_rejected_tokens_gpu is not None:
                ends -= num_rejected_tokens_gpu
            before = self.model.combine_hidden_states(target_hidden_states[ends])
        anchors = (
            cad.seq_lens
            if num_rejected_tokens_gpu is None
            else cad.seq_lens - num_rejected_tokens_gpu
        )
        rows, count = self._drafting(k, cad.num_reqs), cad.num_reqs
        if rows is None:
            return self.backend.hand_out(
                *self._drafts(
                    k, next_token_ids, anchors, cad, first_pages, before, sampling_metadata
                )
            )
        if not rows:
            return Drafts([[]] * count)
        kept = torch.tensor(rows, device=self.device)
        next_token_ids, anchors, first_pages, before = (
            None if each is None else each[kept]
            for each in (next_token_ids, anchors, first_pages, before)
        )
        drafts = self._drafts(
            k, next_token_ids, anchors, _part(cad, kept), first_pages, before, sampling_metadata
        )
        return spread(self.backend.hand_out(*drafts), rows, count)

    def _drafts(
        self,
        k: int,
        next_token_ids: Any,
        anchors: Any,
        cad: CommonAttentionMetadata,
        first_pages: torch.Tensor | None,
        before: torch.Tensor | None,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [B, k] int64, and their confidences [B, k] where the scheduler asks for
        them."""
        layout = block_layout(
            next_token_ids=next_token_ids,
            anchors=anchors,
            block_table=cad.block_table_tensor,
            page_size=self.page_size,
            mask_token_id=self.parallel_drafting_token_id,
            block_size=self.draft_block_size,
            num_speculative_tokens=self._whole_rows or k,
            max_model_len=self.max_model_len,
            first_row=self._first_row,
            may_overflow=cad.max_seq_len + self.draft_block_size > self.max_model_len,
            slots=self.backend.slots,
        )
        hidden_states = self._run_block(layout, cad, first_pages)[layout.sample_indices]
        if self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy:
            tokens, probs = self._sample_draft_tokens(hidden_states, sampling_metadata)
            self._last_draft_probs = probs.view(-1, k, probs.shape[-1]).contiguous()
            return tokens.view(-1, k), None
        ranking = self.backend.ranking
        if self._whole_rows is None:
            return self._draft(hidden_states, next_token_ids, k, ranking)
        tokens, confidences = self._draft(
            hidden_states, next_token_ids, self._whole_rows, ranking._replace(before=before)
        )
        return tokens[:, :k], None if confidences is None else confidences[:, :k]

    def _drafting(self, k: int, num_reqs: int) -> list[int] | None:
        """The rows of the batch that a step with this K drafts for; None for all."""
        skipped = skipped_of(k)
        if not skipped or not self.backend.skips or self._enable_probabilistic_draft_probs:
            return None
        request_ids = self.runner.input_batch.req_ids[:num_reqs]
        return [row for row, request in enumerate(request_ids) if request not in skipped]

    def unless_off(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        """Around the runner's ``propose_draft_token_ids``: a step that neither drafts nor verified
        drafts keeps its features, no more."""

        def proposing(scheduled: Any, *args: Any) -> Any:
            *_, features, spec_decode_metadata, cad, _ = args
            if (
                scheduled.num_spec_tokens_to_schedule
                or spec_decode_metadata.max_spec_len
                or not self.context.may_wait
            ):
                return propose(scheduled, *args)
            return self.skip(features, cad)

        return proposing

    def skip(self, features: Sequence[torch.Tensor], cad: CommonAttentionMetadata) -> Drafts:
        """In place of ``propose``: keeps a step's ``features``, T of [N, H] or longer, and drafts
        nothing."""
        num_tokens, count = cad.num_actual_tokens, cad.num_reqs
        if features[0].shape[0] != num_tokens:
            features = [feature[:num_tokens] for feature in features]
        self.context.keep(
            features, self.runner.positions[:num_tokens], cad.slot_mapping[:num_tokens]
        )
        if num_tokens != count or not self.watch.goes_on(count):
            self.watch.note(cad, *self.watch.written(cad, None))
        return Drafts([[]] * cad.num_reqs)

    def draft_by_chance(self) -> None:
        """From now on hands out tokens by chance in place of the drafter's, so that next to none is
        accepted: what drafting costs where it brings nothing. The drafter computes all the
        same."""
        hand_out, size = self.backend.hand_out, self.vllm_config.model_config.get_vocab_size()
        self.backend.hand_out = lambda tokens, confidences: hand_out(  # type: ignore[method-assign]
            torch.randint_like(tokens, size), confidences
        )

    def _store_context(
        self,
        cad: CommonAttentionMetadata,
        features: torch.Tensor,
        positions: torch.Tensor,
        lengths: list[int],
        num_rejected: torch.Tensor | None,
        *,
        later: bool,
    ) -> None:
        """Writes the context of a step's committed rows into the KV cache, or keeps their features
        until something is drafted."""
        rows = features, positions, cad.slot_mapping[: len(features)]
        if num_rejected is not None:
            rows = self.backend.committed(rows, cad, lengths, num_rejected)
        if later and self.context.may_wait:
            features, *others = rows
            self.context.keep([features], *others)
        else:
            self.context.write(*rows)

    def _live_pages(self) -> tuple[set[int], int] | None:
        """See ``ContextStore``."""
        if self.page_size != self.vllm_config.cache_config.block_size:
            return None  # vLLM's pages are several of the kernel's, by which slots are counted
        return {
            page
            for request in self.runner.requests.values()
            for page in request.block_ids[self.kv_cache_gid]
        }, self.page_size

    def _run_block(
        self, layout: BlockLayout, cad: CommonAttentionMetadata, first_pages: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs the drafter over the block's queries; returns hidden states [B * b or more, H]."""
        if first_pages is not None:
            cad = cad.replace(
                block_table_tensor=without_first_pages(cad.block_table_tensor, first_pages)
            )
            layout = replace(
                layout,
                seq_lens=(layout.seq_lens - first_pages * self.page_size).to(layout.seq_lens.dtype),
            )
        metadata = layer_metadata(self, self._causal, layout, cad)
        if self.backend.run_layers is not None:
            return self.backend.run_layers(
                layout.input_ids, layout.positions, layout.slot_mapping, metadata
            )
        num_tokens = layout.input_ids.shape[0]
        mode, num_input_tokens, num_tokens_across_dp = self._determine_batch_execution_and_padding(
            num_tokens
        )
        self._query_ids[:num_tokens] = layout.input_ids
        self.positions[:num_tokens] = layout.positions
        self._slot_mapping_buffer[:num_tokens] = layout.slot_mapping
        self._slot_mapping_buffer[num_tokens:num_input_tokens] = PAD_SLOT_ID
        slots = self._slot_mapping_buffer[:num_input_tokens]
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_input_tokens,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            return self.model(
                input_ids=self._query_ids[:num_input_tokens],
                positions=self.positions[:num_input_tokens],
            )


def _part(cad: CommonAttentionMetadata, rows: torch.Tensor) -> CommonAttentionMetadata:
    """As much of these requests' metadata as a block is laid out from."""
    most = cad.seq_lens_cpu_upper_bound
    return cad.replace(
        num_reqs=len(rows),
        seq_lens=cad.seq_lens[rows],
        seq_lens_cpu_upper_bound=None if most is None else most[rows.to(most.device)],
        block_table_tensor=cad.block_table_tensor[rows],
    )


def context_counts(worker: Any) -> dict[str, int]:
    """Context positions that a worker's drafter has computed, taken over and missed:
    ``llm.collective_rpc(context_counts)``."""
    return dict(vars(worker.model_runner.drafter.coverage.counts))


def _backend(proposer: DFlashProposer, device: torch.device) -> Backend:
    if device.type != "cpu":
        return Backend(proposer)
    # It looks kernels up that vLLM's builds for other devices do not have.
    from vllm_dflash.cpu.backend import CPUBackend

    return CPUBackend(proposer)

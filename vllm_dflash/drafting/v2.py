"""The DFlash speculator for vLLM's V2 model runner: vLLM's own, with its block kept inside
``max_model_len``.

The draft model is ours because it is registered over the architecture's name, so vLLM's loader
finds it; nothing of the loading is repeated here. The block is forwarded whole whatever
``num_speculative_tokens`` (K) is, and lm_head is asked for K rows a request, for all that predict
where the head is over the whole block. A step that schedules fewer drafts still drafts K, and the
model runner cuts the rest; one that schedules none writes the context and runs no query.
Limits: text only, and one pipeline stage, as the drafter takes the target's embedding.

    pytest tests/engine/test_v2.py tests/engine/test_v2_formats.py tests/engine/test_v2_features.py
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import (
    DFlashSpeculator as NativeDFlashSpeculator,
)

from vllm_dflash.adaptive.settings import is_adaptive
from vllm_dflash.checks import drafter_config
from vllm_dflash.drafting.graphs import graph_tokens, verification
from vllm_dflash.drafting.layout import end_blocks_at
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.heads import Draft, Ranking
from vllm_dflash.kinds import AFTER_ANCHOR, kind_of
from vllm_dflash.metrics.drafter import attach as record_drafter
from vllm_dflash.metrics.recorder import touch_here


def _best(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class DFlashSpeculator(NativeDFlashSpeculator):
    """Drafts blocks as vLLM's speculator does; a block that would reach past ``max_model_len`` is
    moved to end there."""

    _speculator_name = "vllm-dflash"
    vllm_config: VllmConfig
    _draft: "Draft | None" = None
    """What drafts, where it is not the best token of each row."""
    coverage = None
    """Known with the V1 runner only: here no step is without ``propose``."""
    is_measured = False
    """Whether the steps that run are a warm-up's, and none of a request's."""
    _drafts = True
    """Whether the step that runs asks for drafts."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        assert speculative is not None
        drafter = drafter_config(speculative.draft_model_config.hf_config)
        self._first_row, self._num_rows = drafter.first_row, drafter.max_speculative_tokens
        self.num_draft_tokens = speculative.num_speculative_tokens
        super().__init__(vllm_config, device)
        # What is handed out holds K tokens a request, what is forwarded is a whole block: vLLM's
        # own class takes both from one setting.
        self.num_query_per_req = drafter.block_size
        block = copy.copy(speculative)
        block.num_speculative_tokens = drafter.block_size - 1
        # Or the draft's CUDA graphs would be for that schedule's lengths.
        block.num_speculative_tokens_per_batch_size = None
        # vLLM checks rates anew in every copy, and they are for K tokens; the draft verifies none.
        block.rejection_sample_method = "standard"
        block.synthetic_acceptance_rates = None
        whole = copy.copy(self.vllm_config)
        whole.speculative_config = block
        self.vllm_config = whole
        # The anchor's row may predict too: as many rows as tokens.
        self.sample_from_anchor = not self._first_row
        rows = self.max_num_reqs * self._num_rows
        self.sample_indices = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sample_pos = torch.zeros_like(self.sample_indices)
        self.sample_idx_mapping = torch.full_like(self.sample_indices, -1)
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

    @property
    def max_model_len(self) -> int:
        """In tokens, as it is now: where ``--max-model-len`` is -1, vLLM lowers it once it knows
        the KV cache."""
        return int(self.vllm_config.model_config.max_model_len)

    @max_model_len.setter
    def max_model_len(self, value: int) -> None:
        """vLLM 0.32 keeps what it was when the speculator was made: nothing is kept."""

    @contextmanager
    def _with(self, **attributes: Any) -> Iterator[None]:
        """For a while, these attributes."""
        before = {name: getattr(self, name) for name in attributes}
        self.__dict__.update(attributes)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def _graph_tokens(self) -> list[int]:
        """The sizes of the draft's CUDA graphs, in tokens: none where the target has none."""
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes
        if not sizes:
            return []
        cuts = is_adaptive(self.vllm_config)
        verified, most = verification(self.speculative_config, self.max_num_reqs, cuts)
        return graph_tokens(
            sizes,
            verified=verified,
            rows=self.num_query_per_req,
            most_requests=most,
            most_rows=self.max_num_tokens,
        )

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """As vLLM's; attention plans up to ``max_cudagraph_capture_size`` for a graph, whose
        buffers and splits stand still, and the draft's graphs may be larger than the target's."""
        config, sizes = copy.copy(super().attn_vllm_config), self._graph_tokens()
        if sizes:
            compilation = copy.copy(config.compilation_config)
            compilation.max_cudagraph_capture_size = max(
                compilation.max_cudagraph_capture_size, *sizes
            )
            config.compilation_config = compilation
        return config

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As vLLM's, with graphs for as many requests as the target's for verification are."""
        config = copy.copy(self.vllm_config)
        compilation = copy.copy(config.compilation_config)
        compilation.cudagraph_capture_sizes = self._graph_tokens()
        compilation.max_cudagraph_capture_size = max(compilation.cudagraph_capture_sizes, default=0)
        config.compilation_config = compilation
        with self._with(vllm_config=config):
            super().init_cudagraph_manager(cudagraph_mode)

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
        touch_here()  # which drafter serves is known from now on

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
        """As vLLM's; of each block the first K tokens [num_reqs, K] int64. Where a step's
        ``num_speculative_tokens`` is 0 the context is written, and no query runs."""
        off = kwargs.get("num_speculative_tokens") == 0 and not kwargs.get("dummy_run")
        if off:
            # vLLM 0.33 returns before its query pass; 0.32 runs this step eagerly, for a graph
            # would draft.
            kwargs["is_profile"] = True
        # All rows that predict are laid out: what moves a block looks at its last one.
        with self._with(num_speculative_steps=self._num_rows, _drafts=not off):
            return super().propose(*args, **kwargs)

    def _num_graph_context_tokens(self, num_reqs: int) -> int:
        """The context rows that a graph for ``num_reqs`` requests stores: a whole verification of
        each."""
        return min(num_reqs * (self.num_draft_tokens + 1), self.max_num_tokens)

    def _build_uniform_attn_metadata(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        return super()._build_uniform_attn_metadata(*args, **kwargs) if self._drafts else None

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
        if not self._drafts:
            return
        draft = self._draft
        anchors = None if draft is None else self._anchors(num_reqs)
        if slot_mappings is not None:
            self._end_blocks(num_reqs)
        if draft is None or anchors is None:
            with self._with(
                num_speculative_steps=self.num_draft_tokens,
                **{
                    name: self._first(getattr(self, name), num_reqs, self.num_draft_tokens)
                    for name in ("sample_indices", "sample_pos", "sample_idx_mapping")
                },
            ):
                super()._generate_draft(
                    num_reqs, num_tokens_padded, attn_metadata, slot_mappings, *args, **kwargs
                )
            return
        hidden = self._run_model(num_tokens_padded, attn_metadata, slot_mappings, *args, **kwargs)
        ranking, rows = self._ranking, self.num_draft_tokens
        if self._before is not None:
            # Each of its tokens is of the whole block.
            ranking, rows = ranking._replace(before=self._before[:num_reqs]), self._num_rows
        indices = self._first(self.sample_indices, num_reqs, rows)
        tokens, _ = draft(hidden[indices], anchors, rows, ranking)
        self.draft_tokens[:num_reqs] = tokens[:, : self.num_draft_tokens]

    def _first(self, buffer: torch.Tensor, num_reqs: int, k: int) -> torch.Tensor:
        """Of ``buffer``, which has a place for every row that predicts, those of each request's
        first k rows [num_reqs * k]."""
        whole = buffer[: num_reqs * self._num_rows].view(num_reqs, self._num_rows)
        return whole[:, :k].flatten()

    def _end_blocks(self, num_reqs: int) -> None:
        """Moves blocks that reach past ``max_model_len`` to where they end there."""
        queries, samples = (num_reqs, self.num_query_per_req), (num_reqs, self._num_rows)
        num_queries, num_samples = num_reqs * queries[1], num_reqs * samples[1]
        end_blocks_at(
            # Of a row's token: a row predicts its own position's or the next one's.
            self.max_model_len + AFTER_ANCHOR - self._first_row,
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

    def _anchors(self, num_reqs: int) -> torch.Tensor:
        """Each request's anchor [num_reqs], of its block's first row; a copy, for blocks may be
        moved."""
        first = self.input_buffers.input_ids[: num_reqs * self.num_query_per_req]
        return first[:: self.num_query_per_req].clone()

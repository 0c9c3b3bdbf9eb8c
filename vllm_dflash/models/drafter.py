"""The drafter on vLLM's parallel layers and paged KV cache, for the V1 and the V2 model runner.

Two passes. ``combine_hidden_states`` and ``precompute_and_store_context_kv`` turn captured target
features into keys and values of every draft layer and write them into the draft layers' own KV
cache; ``forward`` runs the block's queries, which attend to that cache without a causal mask. vLLM
hands it the target's embedding and lm_head after loading, unless the checkpoint brings its own.
Limits: one pipeline stage.

    pytest tests/engine/test_draft_parity.py tests/engine/test_dflare.py
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix

from vllm_dflash.checks import drafter_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.kinds import kind_of, row_scale
from vllm_dflash.models.context import ContextKV
from vllm_dflash.models.convolution import rows_in_reach
from vllm_dflash.models.kernels import check_kernels
from vllm_dflash.models.layers import DrafterLayer
from vllm_dflash.models.loading import Loading
from vllm_dflash.models.norm import ServedRMSNorm
from vllm_dflash.models.parameters import ServedHead, within_vocabulary
from vllm_dflash.models.swapping import Swapping
from vllm_dflash.pairing import embedding_scale
from vllm_dflash.plugin import patch_set
from vllm_dflash.serving_drafter import ServingDrafter

if TYPE_CHECKING:
    from vllm_dflash.heads import Draft


class FromTarget(nn.Module):
    """Stands where the target's module goes until vLLM shares it; using it earlier is an error."""

    weight = None

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError(
            "the target's embedding was not shared with the drafter: pipeline parallelism is not"
            " supported, set it to 1"
        )


@support_torch_compile
class DrafterModel(nn.Module):
    """The draft layers; embeds the block's tokens with the target's embedding or the checkpoint's
    own."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        config: DrafterConfig,
        first_layer: int,
        target_scale: float,
        quant_config: Any,
        prefix: str = "",
    ) -> None:
        super().__init__()
        dtype = vllm_config.model_config.dtype
        self.embed_tokens: nn.Module = FromTarget()
        given = row_scale(config)
        self.embedding_scale = torch.tensor(target_scale).to(dtype).item() if given is None else 1.0
        """What the target multiplies its rows by, rounded as there; 1 for rows of the
        checkpoint."""
        self.input_scale = 1.0 if given is None else given
        """What the checkpoint says that every row is multiplied by, a mask's own too."""
        self.mask_token_id, self.has_mask_embedding = config.mask_token_id, False
        self.mask_embedding = nn.Parameter(
            torch.zeros(config.hidden_size, dtype=dtype), requires_grad=False
        )
        self.block_size, self.taps = config.block_size, config.conv_kernel_size
        # vLLM tells layers apart by the number in their name: the draft's go on where the target's
        # end.
        self.layers = nn.ModuleList(
            DrafterLayer(
                config,
                window,
                vllm_config.cache_config,
                quant_config,
                maybe_prefix(prefix, f"layers.{first_layer + i}"),
            )
            for i, window in enumerate(config.windows)
        )
        self.norm = ServedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attentions = [layer.self_attn for layer in self.layers]
        self.context_kv = ContextKV(
            config, attentions, dtype, quant_config, maybe_prefix(prefix, "context_kv")
        )
        self.head: ServedHead = kind_of(config).head_part("Served")(config, dtype)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` [N] -> embeddings [N, H]."""
        # With LoRA the target's embedding is wrapped, and the wrapper has the adapters of the
        # target's rows, not of these.
        embeds = getattr(self.embed_tokens, "base_layer", self.embed_tokens)(input_ids)
        if self.embedding_scale != 1.0:
            embeds = embeds * self.embedding_scale
        if self.has_mask_embedding:
            embeds = torch.where(
                (input_ids == self.mask_token_id)[:, None], self.mask_embedding, embeds
            )
        return embeds if self.input_scale == 1.0 else embeds * self.input_scale

    def reach(self, positions: torch.Tensor) -> torch.Tensor:
        """What the layers' convolutions take, ``taps`` of them, for rows at ``positions`` [N]
        int64; see ``rows_in_reach``."""
        return rows_in_reach(positions, self.block_size, self.taps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``input_ids`` [N] (anchors and masks), ``positions`` [N] int64; returns normed hidden
        states [N, H]."""
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual, reach = None, self.reach(positions) if self.taps else None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, reach)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class DrafterForCausalLM(nn.Module):
    """What vLLM loads for every kind of ``vllm_dflash.kinds``."""

    # vLLM's loader shares the target's modules with a drafter that says it has none.
    has_own_embed_tokens = False
    has_own_lm_head = False
    # For quantized checkpoints, whose settings name the projections one by one.
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        patch_set().check_in_place()  # another plug-in's proposer would have loaded this model
        speculative_config = vllm_config.speculative_config
        assert speculative_config is not None
        draft = speculative_config.draft_model_config
        self.config, self.model_path, self.revision = draft.hf_config, draft.model, draft.revision
        self.drafter_config = drafter_config(self.config)
        self.dtype = vllm_config.model_config.dtype
        target_config = speculative_config.target_model_config
        self.model = DrafterModel(
            vllm_config=vllm_config,
            config=self.drafter_config,
            first_layer=target_config.get_total_num_hidden_layers(),
            target_scale=embedding_scale(target_config.hf_text_config),
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "model"),
        )
        self.lm_head: nn.Module = FromTarget()
        self.draft_ids: torch.Tensor | None = None
        # A scale or a cap of logits is left out of it: the best token stays the best, and rounded
        # capped logits have more ties.
        self.logits_processor = LogitsProcessor(self.drafter_config.draft_tokens)
        self._draws = speculative_config.draft_sample_method == "probabilistic"
        check_kernels(self.model)
        self.serving = ServingDrafter(str(self.model_path))
        self._loading = Loading(self, draft)
        self.swapping = Swapping(self, self._loading)
        self.model.layers[-1].self_attn.attn.loaded = self._loading.finish

    def drafting(self) -> "Draft":
        """What the model runners call for a block's tokens."""
        draft, config = self.model.head.draft, self.drafter_config
        if kind_of(config).head.is_argmax:
            return draft
        return within_vocabulary(draft, config.vocab_size)

    def embed_candidates(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``token_ids`` [...] -> embeddings of them [..., H], for a head: the target's, or the
        checkpoint's own."""
        table = getattr(self.model.embed_tokens, "base_layer", self.model.embed_tokens)
        rows, scale = (
            table(token_ids.flatten()).view(*token_ids.shape, -1),
            self.model.embedding_scale * self.model.input_scale,
        )
        return rows if scale == 1.0 else rows * scale

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: object = None,
        is_multimodal: object = None,
    ) -> torch.Tensor:
        """``input_ids`` [N] -> embeddings [N, H]; drafts are text only."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``DFlashModel.forward``."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``rank_logits``, as vLLM asks for them: where it draws drafts, those of which
        probabilities are made."""
        logits = self.rank_logits(hidden_states)
        return logits if logits is None or not self._draws else self.likely(logits)

    def likely(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of which probabilities are made, of ``rank_logits``: times the drafter's
        ``logit_scale``, below its ``logit_cap``."""
        scale, cap = self.drafter_config.logit_scale, self.drafter_config.logit_cap
        if scale != 1.0:
            logits = logits * scale
        if cap is not None:
            # Not of minus infinity: what the draft vocabulary lacks stays impossible.
            capped = cap * torch.tanh(logits / cap)
            logits = capped if self.draft_ids is None else capped.where(logits.isfinite(), logits)
        return logits

    def rank_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``hidden_states`` [N, H] -> logits [N, V]; minus infinity for tokens that the draft
        vocabulary lacks."""
        logits = self.logits_processor(
            getattr(self.lm_head, "base_layer", self.lm_head), hidden_states
        )
        if self.draft_ids is None or logits is None:
            return logits
        full = logits.new_full((logits.shape[0], self.drafter_config.vocab_size), float("-inf"))
        full[:, self.draft_ids] = logits
        return full

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``compute_logits``' best tokens [N] int64 of ``hidden_states`` [N, H]: with
        ``use_local_argmax_reduction`` tensor-parallel ranks exchange a number and a token for each
        row instead of its logits."""
        head = getattr(self.lm_head, "base_layer", self.lm_head)
        if head.org_vocab_size != self.drafter_config.draft_tokens:
            # The target's, with rows for tokens that the drafter does not know.
            logits = self.compute_logits(hidden_states)
            assert logits is not None
            return logits.argmax(-1)
        best = self.logits_processor.get_top_tokens(head, hidden_states)
        return best if self.draft_ids is None else self.draft_ids[best]

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Captured features [N, T * H] -> context [N, C], by the drafter's kind."""
        self.check_features(hidden_states)
        return self.model.context_kv.combine(hidden_states)

    def check_features(self, hidden_states: torch.Tensor) -> None:
        """Raises ``DrafterConfigError`` where the target captured other features [N, T * H] than
        the drafter takes."""
        expected = self.drafter_config.num_features * self.drafter_config.hidden_size
        if hidden_states.shape[-1] != expected:
            raise DrafterConfigError(
                f"the target captured {hidden_states.shape[-1]} features a token, the drafter takes"
                f" {expected}: target_layer_ids do not fit this target; serve the drafter with the"
                " target that its model card names"
            )

    def precompute_and_store_context_kv(
        self,
        context_states: torch.Tensor,
        context_positions: torch.Tensor,
        context_slot_mapping: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Writes the context's keys and values into the draft layers' KV cache.

        Args:
            context_states: [N, C] from ``combine_hidden_states``.
            context_positions: [N] int64.
            context_slot_mapping: [N] int64 cache slots, -1 for rows that must not be written
                (rejected tokens); or one such tensor (or None) a layer; None computes and writes
                nothing (profiling).
        """
        rotary_emb = self.model.layers[0].self_attn.rotary_emb
        keys, values = self.model.context_kv(
            context_states, context_positions, rotary_emb.cos_sin_cache
        )
        if context_slot_mapping is not None:
            self._store(keys, values, context_slot_mapping)

    def store_zeros(self, slots: torch.Tensor) -> None:
        """Writes zeros for keys and values at cache slots [N] int64 of every draft layer."""
        attention = self.model.layers[0].self_attn
        shape = (len(self.model.layers), len(slots), attention.num_kv_heads, attention.head_dim)
        zeros = torch.zeros(shape, dtype=self.dtype, device=slots.device)
        self._store(zeros, zeros, slots)

    def _store(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot_mapping: torch.Tensor | Sequence[torch.Tensor | None],
    ) -> None:
        for i, layer in enumerate(self.model.layers):
            slots = slot_mapping if isinstance(slot_mapping, torch.Tensor) else slot_mapping[i]
            if slots is not None:
                attn = layer.self_attn.attn
                attn.impl.do_kv_cache_update(attn, keys[i], values[i], attn.kv_cache, slots)

    def get_draft_kv_cache_layer_names(self) -> list[str]:
        """The draft layers' names in vLLM's KV cache, in order."""
        return [layer.self_attn.attn.layer_name for layer in self.model.layers]

    def get_draft_attn_causal(self) -> list[bool]:
        """Per draft layer, whether attention is causal: sliding layers of some checkpoints only."""
        return [layer.self_attn.causal for layer in self.model.layers]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads tensors of a checkpoint of any known format, in portions of any size; see
        ``models/loading.py``.

        Raises:
            DrafterConfigError: names each tensor that is unknown, misshaped or not finite; missing
                ones the end of the load names.
        """
        self._loading.take(weights)
        return {f"model.{name}" for name, _ in self.model.named_parameters()}

"""The DFlash drafter on vLLM's parallel layers and paged KV cache, for the V1 and the V2 model runner.

Two passes. ``combine_hidden_states`` and ``precompute_and_store_context_kv`` turn captured target features into
keys and values of every draft layer and write them into the draft layers' own KV cache; ``forward`` runs the
block's queries, which attend to that cache without a causal mask. The drafter owns neither embedding nor
lm_head: vLLM hands it the target's after loading. Limits: one pipeline stage; unquantized weights.

    pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.utils import maybe_prefix

from vllm_dflash.config import DrafterConfig, DrafterConfigError
from vllm_dflash.models.context import ContextKV
from vllm_dflash.weights import check_shapes

# z-lab's name of a projection -> (vLLM's fused parameter, its shard).
_FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class FromTarget(nn.Module):
    """Stands where the target's module goes until vLLM shares it; using it earlier is an error."""

    weight = None

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("the target's embedding was not shared with the drafter: pipeline parallelism is not supported, set it to 1")


class DFlashAttention(nn.Module):
    """Attention of the block's queries over the context in the KV cache and the block itself."""

    def __init__(self, config: DrafterConfig, cache_config: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.q_size = config.num_attention_heads // tp_size * config.head_dim
        self.kv_size = self.num_kv_heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.attn = Attention(
            config.num_attention_heads // tp_size,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """``positions`` [N] int64, ``hidden_states`` [N, H] of the queries; returns [N, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
        k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class DFlashDecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, the residual carried beside the hidden states."""

    def __init__(self, config: DrafterConfig, cache_config: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config, cache_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(config.hidden_size, config.intermediate_size, hidden_act="silu", prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``positions`` [N], ``hidden_states`` and ``residual`` [N, H]; returns the same two."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class DFlashModel(nn.Module):
    """The draft layers; embeds the block's tokens with the target's embedding."""

    def __init__(self, *, vllm_config: VllmConfig, config: DrafterConfig, first_layer: int, prefix: str = "") -> None:
        super().__init__()
        self.embed_tokens: nn.Module = FromTarget()
        self.fc = ReplicatedLinear(
            config.num_features * config.hidden_size,
            config.hidden_size,
            bias=False,
            params_dtype=vllm_config.model_config.dtype,
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # vLLM tells layers apart by the number in their name: the draft's go on where the target's end.
        self.layers = nn.ModuleList(
            DFlashDecoderLayer(config, vllm_config.cache_config, maybe_prefix(prefix, f"layers.{first_layer + i}"))
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.context_kv = ContextKV(config, vllm_config.model_config.dtype, maybe_prefix(prefix, "context_kv"))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` [N] -> embeddings [N, H]."""
        return self.embed_tokens(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """``input_ids`` [N] (anchors and masks), ``positions`` [N] int64; returns normed hidden states [N, H]."""
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class DFlashForCausalLM(nn.Module):
    """What vLLM loads for the architecture ``DFlashDraftModel``."""

    # vLLM's loader shares the target's modules with a drafter that says it has none.
    has_own_embed_tokens = False
    has_own_lm_head = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative_config = vllm_config.speculative_config
        assert speculative_config is not None
        self.config = speculative_config.draft_model_config.hf_config
        self.drafter_config = DrafterConfig.from_dict(self.config.to_dict())
        target_config = speculative_config.target_model_config
        self.model = DFlashModel(
            vllm_config=vllm_config,
            config=self.drafter_config,
            first_layer=target_config.get_total_num_hidden_layers(),
            prefix=maybe_prefix(prefix, "model"),
        )
        self.lm_head: nn.Module = FromTarget()
        # A target's logit scale or soft cap is left out: both are monotonic, and drafts are ranked unless probabilities are asked for.
        self.logits_processor = LogitsProcessor(self.drafter_config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor, multimodal_embeddings: object = None, is_multimodal: object = None) -> torch.Tensor:
        """``input_ids`` [N] -> embeddings [N, H]; drafts are text only."""
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """See ``DFlashModel.forward``."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``hidden_states`` [N, H] -> logits [N, V] through the target's lm_head."""
        return self.logits_processor(self.lm_head, hidden_states)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Captured features [N, T * H] -> context c [N, H]: ``hidden_norm(fc(h))`` (arXiv 2602.06036)."""
        expected = self.drafter_config.num_features * self.drafter_config.hidden_size
        if hidden_states.shape[-1] != expected:
            raise DrafterConfigError(
                f"the target captured {hidden_states.shape[-1]} features a token, the drafter takes {expected}: "
                "target_layer_ids do not fit this target; serve the drafter with the target that its model card names"
            )
        return self.model.hidden_norm(self.model.fc(hidden_states))

    def precompute_and_store_context_kv(
        self,
        context_states: torch.Tensor,
        context_positions: torch.Tensor,
        context_slot_mapping: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Writes the context's keys and values into the draft layers' KV cache.

        Args:
            context_states: c [N, H] from ``combine_hidden_states``.
            context_positions: [N] int64.
            context_slot_mapping: [N] int64 cache slots, -1 for rows that must not be written (rejected tokens); or one
                such tensor (or None) a layer; None computes and writes nothing (profiling).
        """
        rotary_emb = self.model.layers[0].self_attn.rotary_emb
        keys, values = self.model.context_kv(context_states, context_positions, rotary_emb.cos_sin_cache)
        if context_slot_mapping is None:
            return
        for i, layer in enumerate(self.model.layers):
            slots = context_slot_mapping if isinstance(context_slot_mapping, torch.Tensor) else context_slot_mapping[i]
            if slots is not None:
                attn = layer.self_attn.attn
                attn.impl.do_kv_cache_update(attn, keys[i], values[i], attn.kv_cache, slots)

    def get_draft_kv_cache_layer_names(self) -> list[str]:
        """The draft layers' names in vLLM's KV cache, in order."""
        return [layer.self_attn.attn.layer_name for layer in self.model.layers]

    def get_draft_attn_causal(self) -> list[bool]:
        """Per draft layer, whether attention is causal: never."""
        return [False] * len(self.model.layers)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads z-lab's tensors; every one must be there, under its name and in its shape.

        Raises:
            DrafterConfigError: names each tensor that is missing, unknown or misshaped.
        """
        tensors = dict(weights)
        check_shapes(self.drafter_config, {name: tuple(t.shape) for name, t in tensors.items()})
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            module, _, projection = name.removesuffix(".weight").rpartition(".")
            if projection in _FUSED:
                fused, shard = _FUSED[projection]
                parameter = parameters[f"{module}.{fused}.weight"]
                parameter.weight_loader(parameter, tensor, shard)
            else:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", _copy)(parameter, tensor)
        self.model.context_kv.copy_from([layer.self_attn for layer in self.model.layers])
        return {f"model.{name}" for name in parameters}


def _copy(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.data.copy_(tensor)

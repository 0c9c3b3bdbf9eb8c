"""One draft layer on vLLM's parallel layers and paged KV cache, for the V1 and the V2 model runner.

pytest tests/engine/test_draft_parity.py tests/engine/test_dflare.py
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.convolution import convolutions
from vllm_dflash.models.norm import ServedRMSNorm


class DraftAttention(Attention):
    """vLLM's attention layer; under the V1 runner a sliding layer keeps the whole context in the
    cache.

    That runner knows one KV cache group for all draft layers, and groups go by kind. The window
    applies all the same.
    """

    loaded: Callable[[], None] | None = None
    """What is called at the end of every load, of the layer's model at the start and of new weights
    later."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM calls it for attention layers when all others are loaded and packed."""
        super().process_weights_after_loading(act_dtype)
        if self.loaded is not None:
            self.loaded()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, SlidingWindowSpec) or vllm_config.use_v2_model_runner:
            return spec
        shared = {
            f.name: getattr(spec, f.name)
            for f in fields(spec)
            if f.init and f.name != "sliding_window"
        }
        return FullAttentionSpec(
            **{name: value for name, value in shared.items() if name in _FULL_ATTENTION_FIELDS}
        )


_FULL_ATTENTION_FIELDS = frozenset(f.name for f in fields(FullAttentionSpec))


class DrafterAttention(nn.Module):
    """Attention of the block's queries over the context in the KV cache and the block itself."""

    def __init__(
        self,
        config: DrafterConfig,
        window: int | None,
        cache_config: CacheConfig | None,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim, self.causal = config.head_dim, window is not None and config.sliding_causal
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.q_size = config.num_attention_heads // tp_size * config.head_dim
        self.kv_size = self.num_kv_heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = ServedRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = ServedRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=True,
            rope_parameters=dict(config.rope_scaling or {"rope_type": "default"})
            | {"rope_theta": config.rope_theta},
        )
        self.attn = DraftAttention(
            config.num_attention_heads // tp_size,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
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


class DrafterLayer(nn.Module):
    """Pre-norm attention and SwiGLU, the residual carried beside the hidden states."""

    def __init__(
        self,
        config: DrafterConfig,
        window: int | None,
        cache_config: CacheConfig | None,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = DrafterAttention(
            config, window, cache_config, quant_config, f"{prefix}.self_attn"
        )
        self.mlp = Qwen2MLP(
            config.hidden_size,
            config.intermediate_size,
            hidden_act="silu",
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = ServedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ServedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_conv, self.mlp_conv = convolutions(
            config, self.input_layernorm.weight.dtype, prefix
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        reach: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``positions`` [N], ``hidden_states`` and ``residual`` [N, H]; returns the latter two.

        ``reach`` [N, taps], where the layer convolves, from ``convolution.rows_in_reach``.
        """
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        if reach is None:
            hidden_states = self.self_attn(positions, hidden_states)
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            return self.mlp(hidden_states), residual
        hidden_states, kernels = self.attention_conv.before(hidden_states, reach)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states = self.attention_conv.after(hidden_states, kernels, reach)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states, kernels = self.mlp_conv.before(hidden_states, reach)
        return self.mlp_conv.after(self.mlp(hidden_states), kernels, reach), residual

"""DFlare's context: each draft layer's own mixture of target layers, and projections for it.

k_norm is shared with the block's own keys. Served, all layers' projections are one batched GEMM.

    pytest tests/unit/test_reference.py tests/engine/test_dflare.py
"""

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.fused import LayeredContext
from vllm_dflash.reference.drafter import Drafter, RMSNorm, apply_rotary

_FIRST_LOGIT = 2.0
"""The fusion logit that each layer starts with at its own depth; the others start at 0 (arXiv
2606.02091's released code)."""


class Reference(Drafter):
    """The drafter in plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        depth, features = config.num_hidden_layers, config.num_features
        self.layer_fusion_weights = nn.Parameter(torch.zeros(depth, features))
        with torch.no_grad():
            for d in range(depth):
                self.layer_fusion_weights[d, min(features - 1, d * features // depth)] = (
                    _FIRST_LOGIT
                )
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for layer in self.layers:
            attention, kv_size = layer.self_attn, config.num_key_value_heads * config.head_dim
            attention.k_proj_target = nn.Linear(
                config.hidden_size, kv_size, bias=config.attention_bias
            )
            attention.v_proj_target = nn.Linear(
                config.hidden_size, kv_size, bias=config.attention_bias
            )

    def context(self, features: Tensor) -> Tensor:
        """``features`` [..., T * H] -> one context vector a draft layer, [..., D, H]."""
        each = features.unflatten(-1, (self.config.num_features, self.config.hidden_size))
        share = self.layer_fusion_weights.float().softmax(dim=1).to(features.dtype)
        return self.hidden_norm(torch.einsum("...th,dt->...dh", each, share))

    def layer_key_value(
        self, index: int, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        attention, own = self.layers[index].self_attn, c[..., index, :]
        split = (*own.shape[:-1], attention.kv_heads, attention.head_dim)
        key = attention.k_norm(attention.k_proj_target(own).view(split))
        return apply_rotary(key, cos, sin), attention.v_proj_target(own).view(split)


class Served(LayeredContext):
    """The same for vLLM."""

    projections = "k_proj_target", "v_proj_target"

    def make(self, dtype: torch.dtype, prefix: str) -> None:
        self.quantized = False  # the context's own projections are plain
        super().make(dtype, prefix)

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, D * H]."""
        return self.normed(self.mixed(features))

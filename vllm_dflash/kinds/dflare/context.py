"""DFlare's context: each draft layer's own mixture of target layers, and projections for it.

k_norm is shared with the block's own keys. Served, all layers' projections are one batched GEMM.

    pytest tests/unit/test_reference.py tests/engine/test_dflare.py
"""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.parameters import (
    ServedContext,
    capture_order,
    in_parts,
    load_into,
    of_layer,
    own_heads,
)
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


class Served(ServedContext):
    """The same for vLLM. The fusion runs at full width on every rank; keys and values of this
    rank's heads."""

    def __init__(
        self,
        config: DrafterConfig,
        num_kv_heads: int,
        dtype: torch.dtype,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        from vllm_dflash.models.norm import ServedRMSNorm

        self.num_layers, self.num_kv_heads, self.head_dim = (
            config.num_hidden_layers,
            num_kv_heads,
            config.head_dim,
        )
        self.config = config
        self.num_features, self.hidden_size = config.num_features, config.hidden_size
        kv_size = num_kv_heads * config.head_dim
        self.share = nn.Parameter(
            torch.empty(self.num_layers, self.num_features, dtype=dtype), requires_grad=False
        )
        self.hidden_norm = ServedRMSNorm(self.hidden_size, eps=config.rms_norm_eps)
        self.weight = in_parts(
            nn.Parameter(
                torch.empty(self.num_layers, self.hidden_size, 2 * kv_size, dtype=dtype),
                requires_grad=False,
            )
        )
        self.bias = in_parts(
            nn.Parameter(
                torch.zeros(self.num_layers, 1, 2 * kv_size, dtype=dtype), requires_grad=False
            )
        )

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes one of the tensors of ``own_tensors``, in any order; others are not needed: the
        context has projections of its own."""
        layer, module, kind = of_layer(name)
        if name == "layer_fusion_weights":
            # The shares do not depend on the input: the softmax is taken once.
            load_into(self.share, tensor.float().softmax(dim=1)[:, capture_order(self.config)])
        elif name == "hidden_norm.weight":
            load_into(self.hidden_norm.weight, tensor)
        elif module in ("k_proj_target", "v_proj_target"):
            size = self.num_kv_heads * self.head_dim
            part = (
                layer,
                slice(None),
                slice(size) if module == "k_proj_target" else slice(size, None),
            )
            own = own_heads(tensor, self.config, self.num_kv_heads)
            load_into(getattr(self, kind), own.T if kind == "weight" else own[None], part)

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, D * H]."""
        fused = self.share @ features.view(-1, self.num_features, self.hidden_size)
        return self.hidden_norm(fused.view(-1, self.hidden_size)).view(
            -1, self.num_layers * self.hidden_size
        )

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, D * H] -> keys and values [N, D, kv heads, head_dim], before k_norm and
        rotary."""
        by_layer = context.view(-1, self.num_layers, self.hidden_size).transpose(0, 1)
        kv = torch.baddbmm(self.bias, by_layer, self.weight).view(
            self.num_layers, -1, 2, self.num_kv_heads, self.head_dim
        )
        return kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)

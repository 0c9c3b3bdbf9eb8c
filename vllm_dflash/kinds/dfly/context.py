"""DFly's context: DFlash's one vector, and each draft layer's own mixture of target layers on top.

Served, all layers' projections are one batched GEMM.

    pytest tests/unit/test_kinds.py tests/engine/test_formats.py
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
from vllm_dflash.reference.drafter import Drafter, RMSNorm

_STEP = 2.0
"""What a fusion logit loses with each target layer further from the draft layer's own depth, at
first (AngelSpec's released code)."""


class Reference(Drafter):
    """The drafter in plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        depth, features = config.num_hidden_layers, config.num_features
        self.fc = nn.Linear(features * config.hidden_size, config.hidden_size, bias=False)
        own = torch.tensor([round(d / max(depth - 1, 1) * (features - 1)) for d in range(depth)])
        away = (torch.arange(features) - own[:, None]).abs()
        self.layer_fusion_weights = nn.Parameter(-_STEP * away)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context(self, features: Tensor) -> Tensor:
        """``features`` [..., T * H] -> one context vector a draft layer, [..., D, H]."""
        each = features.unflatten(-1, (self.config.num_features, self.config.hidden_size))
        share = self.layer_fusion_weights.float().softmax(dim=1).to(features.dtype)
        mixed = torch.einsum("...th,dt->...dh", each, share)
        return self.hidden_norm(self.fc(features)[..., None, :] + mixed)

    def layer_key_value(
        self, index: int, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.layers[index].self_attn.key_value(c[..., index, :], cos, sin)


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
        from vllm.model_executor.layers.linear import ReplicatedLinear

        from vllm_dflash.models.norm import ServedRMSNorm

        self.config, self.num_kv_heads = config, num_kv_heads
        depth, hidden = config.num_hidden_layers, config.hidden_size
        kv_size = num_kv_heads * config.head_dim
        self.fc = ReplicatedLinear(
            config.num_features * hidden,
            hidden,
            bias=False,
            params_dtype=dtype,
            prefix=f"{prefix}.fc",
            return_bias=False,
        )
        self.share = nn.Parameter(
            torch.empty(depth, config.num_features, dtype=dtype), requires_grad=False
        )
        self.hidden_norm = ServedRMSNorm(hidden, eps=config.rms_norm_eps)
        self.quantized = quant_config is not None
        # Packed weights cannot be stacked.
        if not self.quantized:
            self.weight, self.bias = (
                in_parts(nn.Parameter(tensor, requires_grad=False))
                for tensor in (
                    torch.empty(depth, hidden, 2 * kv_size, dtype=dtype),
                    torch.zeros(depth, 1, 2 * kv_size, dtype=dtype),
                )
            )

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order: its own, and the draft
        layers' keys and values."""
        layer, module, kind = of_layer(name)
        order = capture_order(self.config)
        if name == "fc.weight":
            by_feature = tensor.unflatten(1, (self.config.num_features, -1))
            load_into(self.fc.weight, by_feature[:, order].flatten(1))
        elif name == "layer_fusion_weights":
            # The shares do not depend on the input: the softmax is taken once.
            load_into(self.share, tensor.float().softmax(dim=1)[:, order])
        elif name == "hidden_norm.weight":
            load_into(self.hidden_norm.weight, tensor)
        elif module in ("k_proj", "v_proj") and kind in ("weight", "bias") and not self.quantized:
            size = self.num_kv_heads * self.config.head_dim
            part = slice(size) if module == "k_proj" else slice(size, None)
            own = own_heads(tensor, self.config, self.num_kv_heads)
            load_into(
                getattr(self, kind),
                own.T if kind == "weight" else own[None],
                (layer, slice(None), part),
            )

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, D * H]."""
        config = self.config
        mixed = self.share @ features.view(-1, config.num_features, config.hidden_size)
        mixed = mixed + self.fc(features)[:, None]
        return self.hidden_norm(mixed.view(-1, config.hidden_size)).view(
            -1, config.num_hidden_layers * config.hidden_size
        )

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, D * H] -> keys and values [N, D, kv heads, head_dim], before k_norm and
        rotary."""
        config = self.config
        shape = config.num_hidden_layers, -1, 2, self.num_kv_heads, config.head_dim
        by_layer = context.view(-1, config.num_hidden_layers, config.hidden_size).transpose(0, 1)
        if self.quantized:
            each = [
                a.qkv_proj(own.contiguous())[0][:, a.q_size :]
                for a, own in zip(self.attentions, by_layer, strict=True)
            ]
            kv = torch.stack(each).view(shape)
        else:
            kv = torch.baddbmm(self.bias, by_layer, self.weight).view(shape)
        return kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)

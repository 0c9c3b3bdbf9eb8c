"""DFlash (arXiv 2602.06036): one context vector a token for all draft layers, ``hidden_norm(fc(features))``.

Each layer projects it with the weights of its own keys and values, so the projections of all layers are one GEMM.

    pytest tests/unit/test_reference.py tests/engine/test_draft_parity.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dflash.conditioning import capture_order
from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.drafter import Drafter, RMSNorm


def own_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    return {"fc.weight": (hidden, config.num_features * hidden), "hidden_norm.weight": (hidden,)}


def context_width(config: DrafterConfig) -> int:
    """Elements of a token's context, in the proposers' buffers."""
    return config.hidden_size


class Reference(Drafter):
    """The drafter in plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(config.num_features * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context(self, features: Tensor) -> Tensor:
        """``features`` [..., T * H] -> c [..., H]."""
        return self.hidden_norm(self.fc(features))

    def layer_key_value(self, index: int, c: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[index].self_attn.key_value(c, cos, sin)


class Served(nn.Module):
    """The same on vLLM's layers. The fusion runs at full width on every rank; keys and values of this rank's heads."""

    def __init__(self, config: DrafterConfig, num_kv_heads: int, dtype: torch.dtype, quant_config: Any, prefix: str) -> None:
        super().__init__()
        from vllm.model_executor.layers.linear import ReplicatedLinear

        from vllm_dflash.models.norm import RMSNorm as ServedRMSNorm

        self.num_layers, self.num_kv_heads, self.head_dim = config.num_hidden_layers, num_kv_heads, config.head_dim
        self.order = capture_order(config)
        hidden, kv_size = config.hidden_size, num_kv_heads * config.head_dim
        self.fc = ReplicatedLinear(
            config.num_features * hidden, hidden, bias=False, params_dtype=dtype, prefix=f"{prefix}.fc", return_bias=False
        )  # fmt: skip
        self.hidden_norm = ServedRMSNorm(hidden, eps=config.rms_norm_eps)
        self.quantized = quant_config is not None
        self.attentions: list[Any] = []
        if not self.quantized:
            # A layer of vLLM's, so that its weight is packed as the platform likes it.
            self.proj = ReplicatedLinear(
                hidden, 2 * self.num_layers * kv_size, bias=config.attention_bias, params_dtype=dtype, prefix=f"{prefix}.proj",
                return_bias=False,
            )  # fmt: skip

    def load_weights(self, tensors: dict[str, Tensor], attentions: Sequence[Any]) -> None:
        """``tensors``: those of ``own_tensors``; ``attentions``: the draft layers' loaded attention modules."""
        by_feature = tensors["fc.weight"].unflatten(1, (len(self.order), -1))
        self.fc.weight.data.copy_(by_feature[:, self.order].flatten(1))
        self.hidden_norm.weight.data.copy_(tensors["hidden_norm.weight"])
        if self.quantized:
            # Packed weights cannot be stacked; a list of modules would register them a second time.
            self.attentions = list(attentions)
            return
        for name in ("weight", "bias") if self.proj.bias is not None else ("weight",):
            parts = [getattr(a.qkv_proj, name).data[a.q_size :] for a in attentions]
            keys = [p[: a.kv_size] for p, a in zip(parts, attentions, strict=True)]
            values = [p[a.kv_size :] for p, a in zip(parts, attentions, strict=True)]
            getattr(self.proj, name).data.copy_(torch.cat(keys + values))

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, H]."""
        return self.hidden_norm(self.fc(features))

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, H] -> keys and values [N, D, kv heads, head_dim] of all draft layers, before k_norm and rotary."""
        shape = (-1, 2, self.num_layers, self.num_kv_heads, self.head_dim)
        if self.quantized:
            each = [a.qkv_proj(context)[0][:, a.q_size :] for a in self.attentions]
            kv = torch.stack([e.view(-1, 2, self.num_kv_heads, self.head_dim) for e in each], dim=2)
        else:
            kv = self.proj(context).view(shape)
        return kv[:, 0], kv[:, 1]

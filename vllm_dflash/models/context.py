"""From target features to what the draft layers attend to: the keys and values of the context, for
all layers at once.

The drafter's kind fuses the features and projects them; here its keys are normed and rotated.
Limits: one rotary table for all layers.

    pytest tests/engine/test_draft_parity.py tests/engine/test_dflare.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops

from vllm_dflash.config import DrafterConfig
from vllm_dflash.kinds import kind_of
from vllm_dflash.models.parameters import ServedContext


class ContextKV(nn.Module):
    """Context of the target's features, and its keys and values in every draft layer.

    vLLM's own version hands all layers' k_norm weights to one ``rms_norm`` call, whose CPU kernel
    then applies layer 0's weight to every layer; here each layer's weight multiplies its own keys.
    """

    def __init__(
        self,
        config: DrafterConfig,
        attentions: Sequence[Any],
        dtype: torch.dtype,
        quant_config: Any,
        prefix: str,
    ) -> None:
        """``attentions``: the draft layers' attention modules, in order."""
        super().__init__()
        num_kv_heads = attentions[0].num_kv_heads
        self.num_layers, self.head_dim, self.eps = (
            config.num_hidden_layers,
            config.head_dim,
            config.rms_norm_eps,
        )
        self.num_kv_heads = num_kv_heads
        served: ServedContext = kind_of(config).context_part("Served")(
            config, num_kv_heads, dtype, quant_config, f"{prefix}.context"
        )
        served.attentions, self.context = attentions, served
        # The layers' own weights, looked up in each step: a copy would miss new ones.
        self._k_norms = [attention.k_norm._parameters for attention in attentions]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, by name."""
        self.context.load(name, tensor)

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """``features`` [N, T * H] -> context [N, C], C the context's ``width``."""
        return self.context.combine(features)

    def forward(
        self, context: torch.Tensor, positions: torch.Tensor, rope_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated keys, and values, of every draft layer.

        Args:
            context: [N, C], from ``combine``.
            positions: [N] int64.
            rope_table: [positions, head_dim], cosines and sines as vLLM's rotary embedding keeps
                them.

        Returns:
            Keys and values, each [D, N, kv heads, head_dim].
        """
        k, v = self.context.project(context)
        k = k.float()
        k_norm = torch.stack([norm["weight"] for norm in self._k_norms]).float()[:, None]
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self.eps) * k_norm
        # All layers share the rotary table, so their heads are rotated as the heads of one wide
        # key.
        k = (
            k.to(context.dtype)
            .contiguous()
            .view(-1, self.num_layers * self.num_kv_heads * self.head_dim)
        )
        ops.rotary_embedding(positions, k, None, self.head_dim, rope_table.to(k.dtype), True)
        k = k.view(-1, self.num_layers, self.num_kv_heads, self.head_dim)
        return k.transpose(0, 1), v.transpose(0, 1)

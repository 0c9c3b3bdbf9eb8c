"""From target features to the drafter's context: the keys and values that its layers attend to. DFlash's conditioning.

DFlash (arXiv 2602.06036) gives all draft layers one context vector a token; each layer projects it with the weights
of its own keys and values. Limits: unquantized projections; one rotary table for all layers.

    pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_dflash.config import DrafterConfig


class ContextKV(nn.Module):
    """Keys and values of all draft layers for context tokens, with one GEMM over the stacked projections.

    vLLM's own version hands all layers' k_norm weights to one ``rms_norm`` call, whose CPU kernel then applies layer
    0's weight to every layer; here each layer's weight multiplies its own keys.
    """

    def __init__(self, config: DrafterConfig, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.num_layers, self.head_dim, self.eps = config.num_hidden_layers, config.head_dim, config.rms_norm_eps
        self.num_kv_heads = max(1, config.num_key_value_heads // get_tensor_model_parallel_world_size())
        # A layer of vLLM's, so that its weight is packed as the platform likes it; it already holds this rank's heads only.
        self.proj = ReplicatedLinear(
            config.hidden_size,
            2 * self.num_layers * self.num_kv_heads * self.head_dim,
            bias=False,
            params_dtype=dtype,
            prefix=f"{prefix}.proj",
            return_bias=False,
        )
        self.k_norm = nn.Parameter(torch.ones(self.num_layers, 1, self.head_dim, dtype=torch.float32), requires_grad=False)

    def copy_from(self, attentions: Sequence[Any]) -> None:
        """Stacks the loaded projections of the draft layers' attention modules as [all keys; all values].

        Call it while loading: afterwards vLLM packs the weights, and on a CPU drops the originals.
        """
        q, kv = attentions[0].q_size, attentions[0].kv_size
        keys = [a.qkv_proj.weight.data[q : q + kv] for a in attentions]
        values = [a.qkv_proj.weight.data[q + kv : q + 2 * kv] for a in attentions]
        self.proj.weight.data.copy_(torch.cat(keys + values))
        self.k_norm.data.copy_(torch.stack([a.k_norm.weight.data for a in attentions])[:, None])

    def forward(self, context: torch.Tensor, positions: torch.Tensor, rope_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated keys, and values, of every draft layer.

        Args:
            context: c [N, H].
            positions: [N] int64.
            rope_table: [positions, head_dim], cosines and sines as vLLM's rotary embedding keeps them.

        Returns:
            Keys and values, each [L, N, kv heads, head_dim].
        """
        kv = self.proj(context).view(-1, 2, self.num_layers, self.num_kv_heads, self.head_dim)
        k = kv[:, 0].float()
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self.eps) * self.k_norm
        # All layers share the rotary table, so their heads are rotated as the heads of one wide key.
        k = k.to(context.dtype).view(-1, self.num_layers * self.num_kv_heads * self.head_dim)
        ops.rotary_embedding(positions, k, None, self.head_dim, rope_table.to(k.dtype), True)
        k = k.view(-1, self.num_layers, self.num_kv_heads, self.head_dim)
        return k.transpose(0, 1), kv[:, 1].transpose(0, 1)

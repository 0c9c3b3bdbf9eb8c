"""The DFlash drafter in plain PyTorch: the module that is trained, and the oracle for the served one.

It owns no embedding and no lm_head; callers pass embeddings in and apply the target's lm_head to what comes out.
Parameter names are z-lab's. Limits: full attention, one rotary base (what ``DrafterConfig`` accepts).

Tests: ``pytest tests/unit/test_reference.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig

ContextKV = list[tuple[Tensor, Tensor]]
"""Per draft layer the context's keys (after k_norm and rotary) and values, each [B, S, kv heads, head_dim]."""


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dimension, in float32 inside, as Qwen3's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., 1, head_dim], of integer ``positions`` [...]; the 1 broadcasts over heads."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float()[..., None, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x`` [..., heads, head_dim] in the neox layout: the second half of a head pairs with the first.

    cos and sin are rounded to ``x``'s dtype, as Qwen3's own code and vLLM's tables have them; the rest is float32.
    """
    wide, cos, sin = x.float(), cos.to(x.dtype).float(), sin.to(x.dtype).float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def block_attention(query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Attention of many blocks over a shared context and each over itself, without the blocks' mutual scores.

    Equals SDPA under ``masks.training_mask``; compiled for a CPU it takes a third of the time, forward and backward.

    Args:
        query, own_key, own_value: [B, Q, heads, head_dim], Q a multiple of ``block_size``.
        key, value: [B, S, heads, head_dim], the context.
        mask: bool [B, 1, Q, S], from ``masks.context_mask``.
    """
    rows, length, heads, size = query.shape

    def blocks(x: Tensor) -> Tensor:  # [B, heads, N, block_size, head_dim]
        return x.view(rows, length // block_size, block_size, heads, size).permute(0, 3, 1, 2, 4)

    scale = size**-0.5
    seen = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).float() * scale
    seen = seen.masked_fill(~mask, float("-inf"))
    own = (blocks(query) @ blocks(own_key).transpose(-1, -2)).float().view(rows, heads, length, block_size) * scale
    weights = torch.cat([seen, own], dim=-1).softmax(dim=-1).to(query.dtype)
    out = weights[..., : key.shape[1]] @ value.transpose(1, 2)
    own_out = weights[..., key.shape[1] :].reshape(rows, heads, -1, block_size, block_size) @ blocks(own_value)
    return (out + own_out.reshape(out.shape)).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention of a block's queries over the context and the block itself. No bias."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., kv heads, head_dim] of ``x`` [..., H]: the same for the context and for queries."""
        split = (*x.shape[:-1], self.kv_heads, self.head_dim)
        return apply_rotary(self.k_norm(self.k_proj(x).view(split)), cos, sin), self.v_proj(x).view(split)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, context: tuple[Tensor, Tensor], mask: Tensor | None, block_size: int | None
    ) -> Tensor:
        query = self.q_proj(x).view(*x.shape[:-1], self.heads, self.head_dim)
        query = apply_rotary(self.q_norm(query), cos, sin)
        # Repeated by hand: with enable_gqa the CPU leaves its flash kernel for the slow path.
        groups = self.heads // self.kv_heads
        own = [t.repeat_interleave(groups, dim=2) for t in self.key_value(x, cos, sin)]
        shared = [t.repeat_interleave(groups, dim=2) for t in context]
        if block_size is not None:
            assert mask is not None
            return self.o_proj(block_attention(query, shared[0], shared[1], own[0], own[1], mask, block_size).flatten(2))
        key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(shared, own, strict=True))
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One pre-norm draft layer."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, context: tuple[Tensor, Tensor], mask: Tensor | None, block_size: int | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context, mask, block_size)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlashDrafter(nn.Module):
    """The whole drafter: context features to keys and values, and blocks of queries to hidden states."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_features * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context(self, features: Tensor) -> Tensor:
        """c [..., H] of the target's captured layer outputs ``features`` [..., T * H], in target_layer_ids' order."""
        return self.hidden_norm(self.fc(features))

    def context_kv(self, c: Tensor, positions: Tensor) -> ContextKV:
        """Every draft layer's context keys and values of ``c`` [B, S, H] at ``positions`` [B, S]."""
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return [layer.self_attn.key_value(c, cos, sin) for layer in self.layers]

    def forward(
        self, query_embeds: Tensor, query_positions: Tensor, context: ContextKV,
        attn_mask: Tensor | None = None, block_size: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, Q, H] after the final norm, ready for the target's lm_head.

        Args:
            query_embeds: [B, Q, H], the target's embeddings of [anchor, MASK, ...], one block or several.
            query_positions: [B, Q], integer positions.
            context: from ``context_kv``, [B, S, kv heads, head_dim] each.
            attn_mask: bool, true where a query may look. ``None``: one block that sees everything. Alone:
                [B, 1, Q, S + Q], as ``masks.training_mask``. With ``block_size``: [B, 1, Q, S], as ``masks.context_mask``.
            block_size: every so many queries are a block, which sees itself besides the masked context (for training).
        """
        cos, sin = rotary_angles(query_positions, self.config.head_dim, self.config.rope_theta)
        x = query_embeds
        for layer, kv in zip(self.layers, context, strict=True):
            x = layer(x, cos, sin, kv, attn_mask, block_size)
        return self.norm(x)

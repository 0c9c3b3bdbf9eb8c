"""The drafter in plain PyTorch: the module that is trained, and the oracle for the served one.

``Drafter`` is what all kinds share; a kind of ``vllm_dflash.kinds`` adds how target features become
context. It needs no embedding and no lm_head; callers pass embeddings in (``embed``) and rank what
comes out (``logits``), with the target's or the checkpoint's own. Parameter names are those of the
published checkpoints. Limits: unquantized weights.

Tests: ``pytest tests/unit/test_reference.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads.reference import Block, ReferenceHead
from vllm_dflash.kinds import Kind, kind_of
from vllm_dflash.reference.convolution import BlockConvolution
from vllm_dflash.reference.masks import window_mask
from vllm_dflash.reference.rotary import rotary_angles

ContextKV = list[tuple[Tensor, Tensor]]
"""Per draft layer the context's keys (after k_norm and rotary) and values, each [B, S, kv heads,
head_dim]."""


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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x`` [..., heads, head_dim] in the neox layout: the second half of a head pairs with
    the first.

    cos and sin are rounded to ``x``'s dtype, as Qwen3's own code and vLLM's tables have them; the
    rest is float32.
    """
    wide, cos, sin = x.float(), cos.to(x.dtype).float(), sin.to(x.dtype).float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    mask: Tensor,
    block_size: int,
    causal: bool = False,
) -> Tensor:
    """Attention of many blocks over a shared context and each over itself, without the blocks'
    mutual scores.

    Equals SDPA under ``masks.training_mask``; compiled for a CPU it takes a third of the time,
    forward and backward.

    Args:
        query, own_key, own_value: [B, Q, heads, head_dim], Q a multiple of ``block_size``.
        key, value: [B, S, heads, head_dim], the context.
        mask: bool [B, 1, Q, S], from ``masks.context_mask``.
        causal: whether a query sees no later one of its block.
    """
    rows, length, heads, size = query.shape

    def blocks(x: Tensor) -> Tensor:  # [B, heads, N, block_size, head_dim]
        return x.view(rows, length // block_size, block_size, heads, size).permute(0, 3, 1, 2, 4)

    scale = size**-0.5
    seen = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).float() * scale
    seen = seen.masked_fill(~mask, float("-inf"))
    own = (blocks(query) @ blocks(own_key).transpose(-1, -2)).float() * scale
    if causal:
        own = own.masked_fill(
            ~torch.ones(block_size, block_size, dtype=torch.bool, device=own.device).tril(),
            float("-inf"),
        )
    own = own.view(rows, heads, length, block_size)
    weights = torch.cat([seen, own], dim=-1).softmax(dim=-1).to(query.dtype)
    out = weights[..., : key.shape[1]] @ value.transpose(1, 2)
    own_out = weights[..., key.shape[1] :].reshape(
        rows, heads, -1, block_size, block_size
    ) @ blocks(own_value)
    return (out + own_out.reshape(out.shape)).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention of a block's queries over the context and the block itself."""

    def __init__(self, config: DrafterConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window, self.causal = window, window is not None and config.sliding_causal
        # Training on a GPU puts another way of computing the same in its place (training/flex.py).
        self.attend_blocks: Callable[..., Tensor] = block_attention
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., kv heads, head_dim] of ``x`` [..., H], by the weights of the
        queries' own."""
        split = (*x.shape[:-1], self.kv_heads, self.head_dim)
        return apply_rotary(self.k_norm(self.k_proj(x).view(split)), cos, sin), self.v_proj(x).view(
            split
        )

    def forward(self, x: Tensor, where: "Where", context: tuple[Tensor, Tensor]) -> Tensor:
        query = self.q_proj(x).view(*x.shape[:-1], self.heads, self.head_dim)
        query = apply_rotary(self.q_norm(query), where.cos, where.sin)
        # Repeated by hand: with enable_gqa the CPU leaves its flash kernel for the slow path.
        groups = self.heads // self.kv_heads
        own = [t.repeat_interleave(groups, dim=2) for t in self.key_value(x, where.cos, where.sin)]
        shared = [t.repeat_interleave(groups, dim=2) for t in context]
        mask = where.mask
        if where.block_size is not None:
            assert mask is not None
            if self.window is not None:
                mask = mask & window_mask(
                    where.positions, where.context_positions(shared[0]), self.window
                )
            out = self.attend_blocks(
                query, shared[0], shared[1], own[0], own[1], mask, where.block_size, self.causal
            )
            return self.o_proj(out.flatten(2))
        if self.window is not None:
            seen = torch.cat([where.context_positions(shared[0]), where.positions], dim=1)
            near = window_mask(where.positions, seen, self.window)
            near = (
                near & (seen[:, None, None] <= where.positions[:, None, :, None])
                if self.causal
                else near
            )
            mask = near if mask is None else mask & near
        key, value = (
            torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(shared, own, strict=True)
        )
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Where:
    """Where the queries of one forward are and what they may look at; see ``Drafter.forward``."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    block_size: int | None

    def context_positions(self, key: Tensor) -> Tensor:
        """[B, S] positions of the context ``key`` [B, S, ...]: it starts at 0 and has no holes."""
        return torch.arange(key.shape[1], device=key.device).expand(key.shape[0], -1)


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

    def __init__(self, config: DrafterConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, window)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.convolves = bool(config.conv_kernel_size)
        if self.convolves:
            self.attention_conv, self.mlp_conv = BlockConvolution(config), BlockConvolution(config)

    def forward(self, x: Tensor, where: Where, context: tuple[Tensor, Tensor]) -> Tensor:
        if self.convolves:
            return self._convolved(x, where, context)
        x = x + self.self_attn(self.input_layernorm(x), where, context)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _convolved(self, x: Tensor, where: Where, context: tuple[Tensor, Tensor]) -> Tensor:
        size = where.block_size
        normed, kernels = self.attention_conv.before(self.input_layernorm(x), size)
        attended = self.self_attn(normed, where, context)
        x = x + self.attention_conv.after(attended, kernels, size)
        normed, kernels = self.mlp_conv.before(self.post_attention_layernorm(x), size)
        return x + self.mlp_conv.after(self.mlp(normed), kernels, size)


@dataclass
class OwnTables:
    """What a checkpoint may bring in place of the target's tables; frozen, and none of it a
    parameter of the drafter."""

    embed_tokens: Tensor | None = None
    """[V, H]"""
    lm_head: Tensor | None = None
    """[draft vocabulary or V, H]"""
    d2t: Tensor | None = None
    """[draft vocabulary] int64: a draft token's id plus this is the target's."""

    def on(self, like: Tensor) -> "OwnTables":
        """The same on the device and in the dtype of ``like``."""
        return OwnTables(
            None if self.embed_tokens is None else self.embed_tokens.to(like),
            None if self.lm_head is None else self.lm_head.to(like),
            None if self.d2t is None else self.d2t.to(like.device),
        )

    @property
    def draft_ids(self) -> Tensor | None:
        """The target's ids [draft vocabulary] int64 of the draft vocabulary; None: it is the
        target's."""
        if self.d2t is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


class Drafter(nn.Module):
    """The whole drafter but for ``context`` and ``layer_key_value``, which the kinds define."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.own = OwnTables()
        self.mask_embedding: nn.Parameter | None
        """[H], in place of the embedding of ``mask_token_id``; None: that embedding it is."""
        self.register_parameter("mask_embedding", None)
        self.layers = nn.ModuleList(DraftLayer(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._take_head(kind_of(config))

    def _take_head(self, kind: Kind) -> None:
        """Makes ``head``; its parameters are the drafter's, named as in a checkpoint."""
        self.head: ReferenceHead
        head = kind.head_part("Reference")(self.config)
        if not kind.head.parts:
            self.head = head
            return
        object.__setattr__(self, "head", head)  # no submodule: that would name them head.*
        for part in kind.head.parts:
            if getattr(head, part) is not None:
                self.add_module(part, getattr(head, part))

    def context(self, features: Tensor) -> Tensor:
        """The context of the target's captured layer outputs ``features`` [..., T * H], in
        target_layer_ids' order."""
        raise NotImplementedError

    def layer_key_value(
        self, index: int, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys (normed, rotated) and values [..., kv heads, head_dim] of draft layer ``index`` for
        a context from ``context``."""
        raise NotImplementedError

    def context_kv(self, c: Tensor, positions: Tensor) -> ContextKV:
        """Every draft layer's context keys and values of ``c`` [B, S, ...] at ``positions`` [B,
        S]."""
        cos, sin = rotary_angles(self.config, positions)
        return [self.layer_key_value(i, c, cos, sin) for i in range(len(self.layers))]

    def embed(self, target_embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """Embeddings [..., H] of ``input_ids``: the target's, or the checkpoint's own where it has
        them."""
        embeds = self.table(target_embedding)(input_ids)
        if self.mask_embedding is not None:
            is_mask = (input_ids == self.config.mask_token_id)[..., None]
            embeds = torch.where(is_mask, self.mask_embedding.to(embeds.dtype), embeds)
        return embeds

    def draft_logits(self, lm_head: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [..., draft vocabulary or V] of ``hidden`` [..., H]."""
        # Rows of blocks without their anchors are not contiguous, and without gradients torch would
        # multiply block by block, each with a copy of the table.
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = lm_head(rows) if self.own.lm_head is None else F.linear(rows, self.own.lm_head)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def logits(self, lm_head: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [..., V] of ``hidden`` [..., H]; minus infinity for tokens that the draft
        vocabulary lacks."""
        logits, ids = self.draft_logits(lm_head, hidden), self.own.draft_ids
        if ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        full[..., ids] = logits
        return full

    def block(
        self,
        lm_head: nn.Module,
        hidden: Tensor,
        target_embedding: Callable[[Tensor], Tensor],
        before: Tensor | None,
    ) -> Block:
        """What the head ranks of ``hidden`` [..., H], over the target's whole vocabulary;
        ``before`` is of ``before_anchors``."""

        def rank(rows: Tensor) -> Tensor:
            return self.logits(lm_head, rows).float()

        return Block(hidden, rank(hidden), self.table(target_embedding), rank, before)

    def table(self, target_embedding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Token ids -> embeddings, the target's, or the checkpoint's own where it has them."""
        own = self.own.embed_tokens
        return target_embedding if own is None else lambda ids: F.embedding(ids, own)

    def before_anchors(self, c: Tensor, anchors: Tensor) -> Tensor | None:
        """Of a context ``c`` [B, S, ...] the tokens' before ``anchors`` [B, N] int64, positions
        from 1 on: [B, N, C]; None where the head reads none."""
        if not kind_of(self.config).head.over_block:
            return None
        at = (anchors - 1)[..., None]
        flat = c.flatten(2)
        return flat.gather(1, at.expand(-1, -1, flat.shape[-1]))

    def draft_labels(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where the target's ``tokens`` [...] int64 are in ``draft_logits`` (0 for those that the
        draft vocabulary lacks), and whether it has them."""
        ids = self.own.draft_ids
        if ids is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        places = tokens.new_full((self.config.vocab_size,), -1)
        places[ids] = torch.arange(len(ids), device=ids.device)
        found = places[tokens]
        return found.clamp(min=0), found >= 0

    def forward(
        self,
        query_embeds: Tensor,
        query_positions: Tensor,
        context: ContextKV,
        attn_mask: Tensor | None = None,
        block_size: int | None = None,
    ) -> Tensor:
        """Hidden states [B, Q, H] after the final norm, ready for an lm_head.

        Args:
            query_embeds: [B, Q, H], embeddings of [anchor, MASK, ...], one block or several.
            query_positions: [B, Q], integer positions.
            context: from ``context_kv``, [B, S, kv heads, head_dim] each.
            attn_mask: bool, true where a query may look. ``None``: one block that sees everything.
                Alone: [B, 1, Q, S + Q], as ``masks.training_mask``. With ``block_size``: [B, 1, Q,
                S], as ``masks.context_mask``. Sliding layers narrow it by themselves.
            block_size: every so many queries are a block, which sees itself besides the masked
                context (for training).
        """
        cos, sin = rotary_angles(self.config, query_positions)
        where = Where(query_positions, cos, sin, attn_mask, block_size)
        x = query_embeds
        for layer, kv in zip(self.layers, context, strict=True):
            x = layer(x, where, kv)
        return self.norm(x)

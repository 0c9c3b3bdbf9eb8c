"""A decoder layer on a CPU without compilation: vLLM's kernels called one after the other, with
nothing between them.

Run as modules, half of a forward of one request is Python between kernels (docs/performance.md).
The kernels are those that the modules call, into memory that the next layer takes again.
``draft_layers.py`` has the draft layers, ``target_layers.py`` the target's.
Limits: one rank, projections and a cache that are not quantized, no LoRA, vLLM's CPU attention, no
KV connector; elsewhere the modules run.

Nothing that is made of weights is kept beyond them: they may be loaded anew, in place or by a new
storage, at any time. A parameter is looked up in its module for each forward, and a prepared weight
is taken anew when its module has another kernel.

    pytest tests/engine/test_draft_parity.py tests/engine/test_target_layers.py
    pytest tests/engine/test_reload.py
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm import _custom_ops
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_dflash.cpu.dispatch import has_forward, is_cpu_linear

# By name each call would look its overload up.
_reshape_and_cache, _attention = (
    torch.ops._C.cpu_attn_reshape_and_cache.default,
    torch.ops._C.cpu_attention_with_kv_cache.default,
)
_rotary_embedding = torch.ops._C.rotary_embedding.default
_onednn_mm: Any = torch.ops._C.onednn_mm.default if hasattr(torch.ops._C, "onednn_mm") else None

_KEPT_ROWS = 512
"""Memory for more is given back after each forward: a long prompt's is large, and there it saves
nothing."""


def can_run(model: Any) -> bool:
    """Whether a loaded model's ``layers`` are within the limits of ``Layer``; whether it computes
    what they compute, ``dispatch.other_choices`` says too."""
    linear = [
        p
        for layer in model.layers
        for p in (
            layer.self_attn.qkv_proj,
            layer.self_attn.o_proj,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
        )
    ]
    attention = [layer.self_attn.attn for layer in model.layers]
    return (
        getattr(model, "do_not_compile", False)
        and get_tensor_model_parallel_world_size() == 1
        # By class: a wrapper, as for LoRA, has all that what it wraps has.
        and all(
            type(p) in (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)
            and is_cpu_linear(p)
            for p in linear
        )
        and all(
            type(attn.impl) is CPUAttentionBackendImpl and attn.kv_cache_dtype == "auto"
            for attn in attention
        )
    )


def embedding(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids [N] -> embeddings [N, H]."""
    table = getattr(model.embed_tokens, "base_layer", model.embed_tokens)
    if (
        getattr(model, "has_mask_embedding", False)
        or getattr(model, "embedding_scale", 1.0) != 1.0
        or getattr(model, "input_scale", 1.0) != 1.0
        or type(getattr(table, "quant_method", None)) is not UnquantizedEmbeddingMethod
        or not has_forward(table, VocabParallelEmbedding.forward)
    ):
        return model.embed_input_ids
    parameters = live(table)
    return lambda ids: torch.nn.functional.embedding(ids, parameters["weight"])


def live(module: Any) -> Mapping[str, Any]:
    """A module's parameters by name, as they are when they are asked for: this is several times as
    fast as the module's attributes."""
    return module._parameters


class Linear:
    """``x`` [N, in] -> [N, out], past the module around vLLM's choice of kernel."""

    def __init__(self, projection: Any, *, biased: bool = True) -> None:
        """``biased``: with the projection's bias, where it has one."""
        self._projection, self._parameters = projection, live(projection)
        self._biased = biased and projection.bias is not None
        self._prepare()

    def _prepare(self) -> None:
        """Takes over the kernel that vLLM has made of the weight: a new one after each load."""
        self._kernel = self._projection.cpu_linear
        # vLLM keeps oneDNN's prepared weight in the function that it makes.
        handler: Any = inspect.getclosurevars(self._kernel).nonlocals.get("handler")
        is_prepared = type(handler) is _custom_ops.CPUDNNLGEMMHandler
        self._prepared: Tensor | None = handler.handler_tensor if is_prepared else None
        self._size: int = handler.n if is_prepared else -1

    def workspace(self, x: Tensor) -> Tensor | None:
        """Memory for what becomes of as many rows as ``x`` has; None where the kernel takes its
        own."""
        return None if self._prepared is None else x.new_empty(len(x), self._size)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` of adjacent rows; ``out``, where there is any, is what is returned."""
        if self._projection.cpu_linear is not self._kernel:
            self._prepare()
        bias = self._parameters["bias"] if self._biased else None
        if self._prepared is None:
            return self._kernel(x, self._parameters["weight"], bias)
        if out is None:
            out = x.new_empty(len(x), self._size)
        _onednn_mm(out, x, bias, self._prepared)
        return out


class Workspace:
    """Memory that the layers of one forward take in turn, and its parts: each is read before it is
    written anew. The next forward of as many rows takes it again, unless they are many."""

    reach: Tensor | None = None
    """``DrafterModel.reach`` of the rows, where layers convolve."""

    def __init__(self, layer: "Layer") -> None:
        self._layer, self._count = layer, -1

    def of(self, rows: Tensor) -> "Workspace":
        """For as many rows as ``rows`` [N, H] has."""
        if rows.shape[0] > _KEPT_ROWS:
            return Workspace(self._layer)._make(rows)
        if rows.shape[0] != self._count:
            # Outside of inference mode, as it may be used there and elsewhere.
            with torch.inference_mode(False):
                self._make(rows)
        return self

    def _make(self, rows: Tensor) -> "Workspace":
        layer, self._count = self._layer, rows.shape[0]
        self.qkv, self.hidden, self.gate_up = (
            layer.qkv.workspace(rows),
            layer.o.workspace(rows),
            layer.gate_up.workspace(rows),
        )
        self.down = layer.down.workspace(rows)
        self.attended = rows.new_empty(len(rows), layer.q_size)
        self.attended_heads = self.attended.view(len(rows), -1, layer.head_dim)
        if self.qkv is not None:
            self.qk_and_values = layer.qk_and_values(self.qkv)
        if self.gate_up is not None:
            self.gate_and_up = self.gate_up.chunk(2, dim=-1)
        return self


class Layer:
    """One layer, from the normed hidden states to what is added to the residual. How it norms,
    subclasses say."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.eps = (
            live(layer.input_layernorm),
            layer.input_layernorm.variance_epsilon,
        )
        self.post_norm = live(layer.post_attention_layernorm)
        projections = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        self.qkv, self.o, self.gate_up, self.down = map(Linear, projections)
        self.q_size, self.kv_size, self.head_dim = (
            attention.q_size,
            attention.kv_size,
            attention.head_dim,
        )
        self.rotate = _rotation(attention.rotary_emb, self.input_norm["weight"].dtype)
        self._attn, self.name, self._impl = (
            attention.attn,
            attention.attn.layer_name,
            attention.attn.impl,
        )
        self._kv_cache: Tensor | None = None

    def heads(self, qk: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``qk`` [N, heads, head_dim] of queries and then keys, a part of wider rows; returns both,
        normed where their heads have norms, and rotated."""
        raise NotImplementedError

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, [N, H], normed; and the sum itself."""
        raise NotImplementedError

    def __call__(
        self,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor,
        slots: Tensor,
        metadata: Mapping[str, CPUAttentionMetadata],
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``residual`` [N, H]; returns both of the next layer, [N, H]."""
        qkv = self.qkv(hidden, workspace.qkv)
        qk, values = workspace.qk_and_values if qkv is workspace.qkv else self.qk_and_values(qkv)
        queries, keys = self.heads(qk, positions)
        self.store(keys, values, slots)
        self.attend(queries, workspace.attended_heads, metadata[self.name])
        hidden, residual = self.norm_sum(
            self.o(workspace.attended, workspace.hidden), residual, self.post_norm["weight"]
        )
        both = self.gate_up(hidden, workspace.gate_up)
        gate, up = workspace.gate_and_up if both is workspace.gate_up else both.chunk(2, dim=-1)
        # vLLM's one kernel for both is not vectorised: 98 us for 64 rows of 768, where these two
        # take 22.
        return self.down(silu(gate).mul_(up), workspace.down), residual

    def qk_and_values(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``qkv`` [N, heads * head_dim], queries and then keys, and values: each [N, heads,
        head_dim]."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        num_qk = (self.q_size + self.kv_size) // self.head_dim
        return heads[:, :num_qk], heads[:, num_qk:]

    def store(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """As ``CPUAttentionBackendImpl.do_kv_cache_update``: both [N, kv heads, head_dim]."""
        attn = self._attn
        if self._kv_cache is not attn.kv_cache:
            self._kv_cache = attn.kv_cache
            pages, kv_heads, page_size, _ = attn.kv_cache.shape
            self._keys, self._values = attn.kv_cache.view(pages, kv_heads, 2 * page_size, -1).chunk(
                2, dim=2
            )
        scales = attn._k_scale_float, attn._v_scale_float, self._impl.kv_cache_dtype
        _reshape_and_cache(keys, values, self._keys, self._values, slots, attn.isa, *scales)

    def attend(self, q: Tensor, out: Tensor, metadata: CPUAttentionMetadata) -> None:
        """As ``CPUAttentionBackendImpl.forward``: ``q`` and ``out`` [N, heads, head_dim]."""
        attn, impl = self._attn, self._impl
        _attention(
            q,
            self._keys,
            self._values,
            out,
            metadata.query_start_loc,
            metadata.seq_lens,
            impl.scale,
            metadata.causal,
            impl.alibi_slopes,
            impl.sliding_window,
            metadata.block_table,
            impl.logits_soft_cap,
            metadata.scheduler_metadata,
            impl.sinks,
            metadata.dynamic_causal,
            attn._k_scale_float,
            attn._v_scale_float,
            impl.kv_cache_dtype,
        )


def _rotation(rotary: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Any]:
    """Rotates queries and keys, [N, heads * head_dim] each, by their positions [N], in place."""
    table = rotary._match_cos_sin_cache_dtype(torch.empty(0, dtype=dtype))
    size, is_neox = rotary.head_size, rotary.is_neox_style
    return lambda positions, queries, keys: _rotary_embedding(
        positions, queries, keys, size, table, is_neox
    )

"""Decoder layers on a CPU without compilation: vLLM's kernels called one after the other, with nothing between them.

Run as modules, half of a draft forward of one request is Python between kernels (docs/performance.md). The kernels are those that the
modules call. Here the draft layers, in ``eager_target.py`` the target's. Limits: one rank, projections and a cache that are not
quantized, vLLM's CPU attention, no KV connector; elsewhere the modules run.

    pytest tests/engine/test_draft_parity.py
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_dflash.conditioning import dflash

# By name each call would look its overload up.
_rms_norm, _fused_add_rms_norm = torch.ops._C.rms_norm.default, torch.ops._C.fused_add_rms_norm.default
_reshape_and_cache, _attention = torch.ops._C.cpu_attn_reshape_and_cache.default, torch.ops._C.cpu_attention_with_kv_cache.default


def can_run(model: Any) -> bool:
    """Whether ``Layer`` computes what the modules of a loaded model's ``layers`` compute."""
    linear = [
        p for layer in model.layers for p in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    ]
    attention = [layer.self_attn.attn for layer in model.layers]
    return (
        getattr(model, "do_not_compile", False)
        and get_tensor_model_parallel_world_size() == 1
        and all(hasattr(projection, "cpu_linear") for projection in linear)
        and all(type(attn.impl) is CPUAttentionBackendImpl and attn.kv_cache_dtype == "auto" for attn in attention)
    )


class EagerLayers:
    """All layers of a loaded ``DrafterModel``."""

    def __init__(self, model: Any) -> None:
        self._embed = embedding(model)
        self._norm_weight, self._eps = model.norm.weight.data, model.norm.variance_epsilon
        self.layers = [_DraftLayer(layer) for layer in model.layers]

    def __call__(self, input_ids: Tensor, positions: Tensor, slots: Tensor, metadata: Mapping[str, CPUAttentionMetadata]) -> Tensor:
        """As ``DrafterModel.forward`` in a forward context.

        Args:
            input_ids: [N] int32, anchors and masks.
            positions, slots: [N] int64.
            metadata: by layer name.

        Returns:
            Normed hidden states [N, H].
        """
        residual = self._embed(input_ids)
        hidden = torch.empty_like(residual)
        first, *others = self.layers
        _rms_norm(hidden, residual, first.input_weight, first.eps)
        hidden, _ = first(positions, hidden, residual, slots, metadata)
        for layer in others:
            _fused_add_rms_norm(hidden, residual, layer.input_weight, layer.eps)
            hidden, _ = layer(positions, hidden, residual, slots, metadata)
        _fused_add_rms_norm(hidden, residual, self._norm_weight, self._eps)
        return hidden


class EagerContext:
    """The context's keys and values of a loaded ``DrafterModel``, written into the KV cache of its layers."""

    def __init__(self, model: Any, layers: EagerLayers) -> None:
        self._project, self._layers = _projection(model.context_kv.conditioning), layers.layers

    def __call__(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """As ``combine_hidden_states`` and ``precompute_and_store_context_kv``.

        Args:
            features: [N, T * H].
            positions, slots: [N] int64.
        """
        keys, values = self._project(features)
        # A layer's rows side by side: the norm's kernel takes rows for adjacent.
        each = keys.transpose(0, 1).contiguous().unbind()
        for layer, k, v in zip(self._layers, each, values.unbind(1), strict=True):
            layer.norm_and_rotate(k, positions)
            layer.store(k, v, slots)


def eager_logits(drafter: Any) -> Callable[[Tensor], Tensor]:
    """``compute_logits`` of a loaded ``DrafterForCausalLM``: hidden states [N, H] -> logits [N, V]."""
    head, processor = getattr(drafter.lm_head, "base_layer", drafter.lm_head), drafter.logits_processor
    is_plain = type(getattr(head, "quant_method", None)) is UnquantizedEmbeddingMethod and hasattr(head, "cpu_linear")
    if not is_plain or drafter.draft_ids is not None or processor.head_dtype not in (None, drafter.dtype):
        return drafter.compute_logits
    linear, vocab_size = _Linear(head, None), processor.org_vocab_size
    return lambda hidden: linear(hidden)[:, :vocab_size]


def _projection(conditioning: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Features [N, T * H] -> keys and values [N, D, kv heads, head_dim]."""
    if not (isinstance(conditioning, dflash.Served) and not conditioning.quantized and hasattr(conditioning.fc, "cpu_linear")):
        return lambda features: conditioning.project(conditioning.combine(features))
    fc, norm = _Linear(conditioning.fc, None), conditioning.hidden_norm
    proj = _Linear(conditioning.proj, conditioning.proj.bias)
    weight, eps = norm.weight.data, norm.variance_epsilon
    shape = -1, 2, conditioning.num_layers, conditioning.num_kv_heads, conditioning.head_dim

    def project(features: Tensor) -> tuple[Tensor, Tensor]:
        context = fc(features)
        _rms_norm(context, context, weight, eps)
        keys, values = proj(context).view(shape).unbind(1)
        return keys, values

    return project


def embedding(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids [N] -> embeddings [N, H]."""
    table = getattr(model.embed_tokens, "base_layer", model.embed_tokens)
    if getattr(model, "has_mask_embedding", False) or type(getattr(table, "quant_method", None)) is not UnquantizedEmbeddingMethod:
        return model.embed_input_ids
    return functools.partial(torch.nn.functional.embedding, weight=table.weight.data)


class Layer:
    """One layer, from the normed hidden states to what is added to the residual. How it norms, subclasses say."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_weight, self.eps = layer.input_layernorm.weight.data, layer.input_layernorm.variance_epsilon
        self._post_weight = layer.post_attention_layernorm.weight.data
        projections = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        self._qkv, self._o, self._gate_up, self._down = (_Linear(p, p.bias) for p in projections)
        self._q_weight, self._k_weight = attention.q_norm.weight.data, attention.k_norm.weight.data
        self._sizes, self._head_dim = (attention.q_size, attention.kv_size, attention.kv_size), attention.head_dim
        self._rotate, self._attn, self._name = attention.rotary_emb.forward_cpu, attention.attn, attention.attn.layer_name
        self._impl = self._attn.impl
        self._kv_cache: Tensor | None = None

    def norm_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """``heads`` [N, heads, head_dim], a part of wider rows; returns adjacent rows."""
        raise NotImplementedError

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, [N, H], normed; and the sum itself."""
        raise NotImplementedError

    def __call__(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, slots: Tensor, metadata: Mapping[str, CPUAttentionMetadata]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``hidden`` and ``residual`` [N, H]; returns both of the next layer, [N, H]."""
        count, head_dim = len(hidden), self._head_dim
        q, k, v = self._qkv(hidden).split(self._sizes, dim=-1)
        heads = self.norm_heads(q.view(count, -1, head_dim), self._q_weight)
        keys = self.norm_heads(k.view(count, -1, head_dim), self._k_weight)
        self._rotate(positions, heads.view(count, -1), keys.view(count, -1))
        out = torch.empty_like(heads)
        self.store(keys, v.view(count, -1, head_dim), slots)
        self._attend(heads, out, metadata[self._name])
        hidden, residual = self.norm_sum(self._o(out.view(count, -1)), residual, self._post_weight)
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        # vLLM's one kernel for both is not vectorised: 98 us for 64 rows of 768, where these two take 22.
        return self._down(silu(gate).mul_(up)), residual

    def store(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """As ``CPUAttentionBackendImpl.do_kv_cache_update``: both [N, kv heads, head_dim]."""
        attn = self._attn
        if self._kv_cache is not attn.kv_cache:
            self._kv_cache = attn.kv_cache
            pages, kv_heads, page_size, _ = attn.kv_cache.shape
            self._keys, self._values = attn.kv_cache.view(pages, kv_heads, 2 * page_size, -1).chunk(2, dim=2)
        scales = attn._k_scale_float, attn._v_scale_float, self._impl.kv_cache_dtype
        _reshape_and_cache(keys, values, self._keys, self._values, slots, attn.isa, *scales)

    def _attend(self, q: Tensor, out: Tensor, metadata: CPUAttentionMetadata) -> None:
        """As ``CPUAttentionBackendImpl.forward``: ``q`` and ``out`` [N, heads, head_dim]."""
        attn, impl = self._attn, self._impl
        _attention(
            q, self._keys, self._values, out, metadata.query_start_loc, metadata.seq_lens, impl.scale, metadata.causal, impl.alibi_slopes,
            impl.sliding_window, metadata.block_table, impl.logits_soft_cap, metadata.scheduler_metadata, impl.sinks,
            metadata.dynamic_causal, attn._k_scale_float, attn._v_scale_float, impl.kv_cache_dtype,
        )  # fmt: skip


class _DraftLayer(Layer):
    """Norms are vLLM's kernels, in place."""

    def norm_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        heads = heads.contiguous()
        _rms_norm(heads, heads, weight, self.eps)
        return heads

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        _fused_add_rms_norm(hidden, residual, weight, self.eps)
        return hidden, residual

    def norm_and_rotate(self, keys: Tensor, positions: Tensor) -> None:
        """In place: adjacent rows [N, kv heads, head_dim]."""
        _rms_norm(keys, keys, self._k_weight, self.eps)
        self._rotate(positions, keys.view(len(keys), -1), None)


class _Linear:
    """``x`` [N, in] -> [N, out], past the module around vLLM's choice of kernel."""

    def __init__(self, projection: Any, bias: Tensor | None) -> None:
        self._kernel, self._weight, self._bias = projection.cpu_linear, projection.weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernel(x, self._weight, self._bias)

"""The draft layers on a CPU without compilation: vLLM's kernels called one after the other, with nothing between them.

Run as modules, half of a draft forward of one request is Python between kernels (docs/performance.md). The kernels are those that the
modules call. Limits: one rank, projections and a cache that are not quantized, vLLM's
CPU attention, no KV connector; elsewhere the modules run.

    pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata


class EagerLayers:
    """All layers of a loaded ``DrafterModel``."""

    def __init__(self, model: Any) -> None:
        self._embed, self._norm, self._layers = model.embed_input_ids, model.norm, [_Layer(layer) for layer in model.layers]

    @staticmethod
    def fit(model: Any) -> bool:
        """Whether they compute what the modules of a loaded model compute."""
        linear = [
            p
            for layer in model.layers
            for p in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        ]
        attention = [layer.self_attn.attn for layer in model.layers]
        return (
            getattr(model, "do_not_compile", False)
            and get_tensor_model_parallel_world_size() == 1
            and all(hasattr(projection, "cpu_linear") for projection in linear)
            and all(type(attn.impl) is CPUAttentionBackendImpl and attn.kv_cache_dtype == "auto" for attn in attention)
        )

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
        first, *others = self._layers
        torch.ops._C.rms_norm(hidden, residual, first.input_weight, first.eps)
        hidden = first(positions, hidden, residual, slots, metadata)
        for layer in others:
            torch.ops._C.fused_add_rms_norm(hidden, residual, layer.input_weight, layer.eps)
            hidden = layer(positions, hidden, residual, slots, metadata)
        torch.ops._C.fused_add_rms_norm(hidden, residual, self._norm.weight.data, self._norm.variance_epsilon)
        return hidden


class _Layer:
    """One layer, from the normed hidden states to what is added to the residual."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_weight, self.eps = layer.input_layernorm.weight.data, layer.input_layernorm.variance_epsilon
        self._post_weight = layer.post_attention_layernorm.weight.data
        self._qkv, self._o, self._gate_up, self._down = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        self._q_weight, self._k_weight = attention.q_norm.weight.data, attention.k_norm.weight.data
        self._sizes, self._head_dim = (attention.q_size, attention.kv_size, attention.kv_size), attention.head_dim
        self._rotate, self._attn, self._name = attention.rotary_emb.forward_cpu, attention.attn, attention.attn.layer_name
        self._kv_cache: Tensor | None = None

    def __call__(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, slots: Tensor, metadata: Mapping[str, CPUAttentionMetadata]
    ) -> Tensor:  # fmt: skip
        """``hidden`` and ``residual`` [N, H], the latter added to in place; returns [N, H]."""
        count, head_dim = len(hidden), self._head_dim
        q, k, v = _linear(self._qkv, hidden).split(self._sizes, dim=-1)
        # The norm's kernel takes rows for adjacent.
        q, k = q.contiguous(), k.contiguous()
        for x, weight in ((q, self._q_weight), (k, self._k_weight)):
            rows = x.view(-1, head_dim)
            torch.ops._C.rms_norm(rows, rows, weight, self.eps)
        q, k = self._rotate(positions, q, k)
        out = torch.empty_like(q)
        self._attend(
            q.view(count, -1, head_dim), k.view(count, -1, head_dim), v.view(count, -1, head_dim), out.view(count, -1, head_dim), slots,
            metadata[self._name],
        )  # fmt: skip
        hidden = _linear(self._o, out)
        torch.ops._C.fused_add_rms_norm(hidden, residual, self._post_weight, self.eps)
        both = _linear(self._gate_up, hidden)
        gated = both.new_empty(count, both.shape[1] // 2)
        torch.ops._C.silu_and_mul(gated, both)
        return _linear(self._down, gated)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, slots: Tensor, metadata: CPUAttentionMetadata) -> None:
        """As ``CPUAttentionBackendImpl``'s update of the cache and its forward: ``q`` and ``out`` [N, heads, head_dim]."""
        attn, impl = self._attn, self._attn.impl
        if self._kv_cache is not attn.kv_cache:
            self._kv_cache = attn.kv_cache
            pages, kv_heads, page_size, _ = attn.kv_cache.shape
            self._keys, self._values = attn.kv_cache.view(pages, kv_heads, 2 * page_size, -1).chunk(2, dim=2)
        scales = attn._k_scale_float, attn._v_scale_float, impl.kv_cache_dtype
        torch.ops._C.cpu_attn_reshape_and_cache(k, v, self._keys, self._values, slots, attn.isa, *scales)
        torch.ops._C.cpu_attention_with_kv_cache(
            q, self._keys, self._values, out, metadata.query_start_loc, metadata.seq_lens, impl.scale, metadata.causal, impl.alibi_slopes,
            impl.sliding_window, metadata.block_table, impl.logits_soft_cap, metadata.scheduler_metadata, impl.sinks,
            metadata.dynamic_causal, *scales,
        )  # fmt: skip


def _linear(projection: Any, x: Tensor) -> Tensor:
    """``x`` [N, in] -> [N, out], past the module around vLLM's choice of kernel."""
    return projection.cpu_linear(x, projection.weight, projection.bias)

"""The draft layers on a CPU without compilation, kernel by kernel (``layers.py``), and what is
around them.

pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from vllm_dflash.cpu.dispatch import only_projects
from vllm_dflash.cpu.layers import Layer, Linear, Workspace, embedding, live

# By name each call would look its overload up.
_rms_norm, _fused_add_rms_norm = (
    torch.ops._C.rms_norm.default,
    torch.ops._C.fused_add_rms_norm.default,
)


class EagerLayers:
    """All layers of a loaded ``DrafterModel``."""

    def __init__(self, model: Any) -> None:
        self._embed = embedding(model)
        self._norm, self._eps = live(model.norm), model.norm.variance_epsilon
        self._reach = model.reach if model.taps else None
        self.layers = [
            _DraftLayer(layer) if layer.mlp_conv is None else _Convolved(layer)
            for layer in model.layers
        ]
        self._workspace = Workspace(self.layers[0])

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        metadata: Mapping[str, CPUAttentionMetadata],
    ) -> Tensor:
        """As ``DrafterModel.forward`` in a forward context.

        Args:
            input_ids: [N] int32, anchors and masks.
            positions, slots: [N] int64.
            metadata: by layer name.

        Returns:
            Normed hidden states [N, H], good until the next call.
        """
        residual = self._embed(input_ids)
        hidden = torch.empty_like(residual)
        first, *others = self.layers
        workspace = self._workspace.of(residual)
        if self._reach is not None:
            workspace.reach = self._reach(positions)
        _rms_norm(hidden, residual, first.input_norm["weight"], first.eps)
        hidden, _ = first(positions, hidden, residual, slots, metadata, workspace)
        for layer in others:
            _fused_add_rms_norm(hidden, residual, layer.input_norm["weight"], layer.eps)
            hidden, _ = layer(positions, hidden, residual, slots, metadata, workspace)
        _fused_add_rms_norm(hidden, residual, self._norm["weight"], self._eps)
        return hidden


class EagerContext:
    """The context's keys and values of a loaded ``DrafterModel``, written into the KV cache of its
    layers."""

    def __init__(self, model: Any, layers: EagerLayers) -> None:
        self._project, self._layers = _projection(model.context_kv.context), layers.layers

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
    """``rank_logits`` of a loaded ``DrafterForCausalLM``: hidden states [N, H] -> logits [N,
    V]."""
    head, processor = (
        getattr(drafter.lm_head, "base_layer", drafter.lm_head),
        drafter.logits_processor,
    )
    is_plain = type(getattr(head, "quant_method", None)) is UnquantizedEmbeddingMethod and hasattr(
        head, "cpu_linear"
    )
    if (
        not is_plain
        or not only_projects(processor)
        or drafter.draft_ids is not None
        or processor.head_dtype not in (None, drafter.dtype)
    ):
        return drafter.rank_logits
    linear, vocab_size = Linear(head, biased=False), processor.org_vocab_size
    return lambda hidden: linear(hidden)[:, :vocab_size]


def _projection(context: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Features [N, T * H] -> keys and values [N, D, kv heads, head_dim], by the context's fast part
    where it has one."""
    fast = context.fast() if hasattr(context, "fast") else None
    return fast or (lambda features: context.project(context.combine(features)))


class _DraftLayer(Layer):
    """Norms are vLLM's kernels, in place."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention = layer.self_attn
        self._q_norm, self._k_norm = live(attention.q_norm), live(attention.k_norm)

    def heads(self, qk: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        count, num_heads = qk.shape[0], self.q_size // self.head_dim
        queries, keys = qk[:, :num_heads].contiguous(), qk[:, num_heads:].contiguous()
        _rms_norm(queries, queries, self._q_norm["weight"], self.eps)
        _rms_norm(keys, keys, self._k_norm["weight"], self.eps)
        self.rotate(positions, queries.view(count, -1), keys.view(count, -1))
        return queries, keys

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        _fused_add_rms_norm(hidden, residual, weight, self.eps)
        return hidden, residual

    def norm_and_rotate(self, keys: Tensor, positions: Tensor) -> None:
        """In place: adjacent rows [N, kv heads, head_dim]."""
        _rms_norm(keys, keys, self._k_norm["weight"], self.eps)
        self.rotate(positions, keys.view(keys.shape[0], -1), None)


class _Convolved(_DraftLayer):
    """With convolutions around attention and MLP, by their modules; written apart, so that a layer
    without them pays nothing."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._around_attention, self._around_mlp = layer.attention_conv, layer.mlp_conv

    def __call__(
        self,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor,
        slots: Tensor,
        metadata: Mapping[str, CPUAttentionMetadata],
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:
        reach = workspace.reach
        assert reach is not None
        hidden, kernels = self._around_attention.before(hidden, reach)
        qk, values = self.qk_and_values(self.qkv(hidden, workspace.qkv))
        queries, keys = self.heads(qk, positions)
        self.store(keys, values, slots)
        self.attend(queries, workspace.attended_heads, metadata[self.name])
        attended = self.o(workspace.attended, workspace.hidden)
        hidden, residual = self.norm_sum(
            self._around_attention.after(attended, kernels, reach),
            residual,
            self.post_norm["weight"],
        )
        hidden, kernels = self._around_mlp.before(hidden, reach)
        gate, up = self.gate_up(hidden, workspace.gate_up).chunk(2, dim=-1)
        fed = self.down(silu(gate).mul_(up), workspace.down)
        return self._around_mlp.after(fed, kernels, reach), residual

"""The target's layers on a CPU without compilation: the same operations as vLLM's modules, to the
last bit, with less between them.

With one request, half of the target's forward is Python between small operators, seven for each
norm and a dozen calls for each attention (docs/performance.md). A norm is one call here, which does
the same arithmetic in the same order, so that the target writes what it writes without a drafter.
Limits: Qwen3, not its mixtures of experts, and those of ``layers.py``; elsewhere, and in steps with
embeddings for input, the modules run.

    pytest tests/engine/test_target_layers.py tests/engine/test_reload.py
"""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3Model

from vllm_dflash.cpu.layers import Layer, Workspace, can_run, embedding, live
from vllm_dflash.patches import cpu_target
from vllm_dflash.plugin import patch_set


def use_eager_layers(target: Any) -> bool:
    """Lets a loaded target model run its layers by this module's class; returns whether they fit
    it."""
    model: Any = getattr(target, "model", None)
    if type(model) is not Qwen3Model or not _is_known(model) or not can_run(model):
        return False
    return patch_set().attach(model, [cpu_target.PATCH], model)


def _is_known(model: Any) -> bool:
    """Whether each part of the model is vLLM's own, as its class says, and nothing listens to
    it."""
    norms = [model.norm]
    for layer in model.layers:
        attention = layer.self_attn
        norms += [
            layer.input_layernorm,
            layer.post_attention_layernorm,
            attention.q_norm,
            attention.k_norm,
        ]
        rotates_by = getattr(attention.rotary_emb, "_forward_method", None)
        if (
            type(layer) is not Qwen3DecoderLayer
            or type(layer.mlp.act_fn) is not SiluAndMul
            or getattr(rotates_by, "__func__", None) is not RotaryEmbedding.forward_cpu
            or attention.attn.kv_sharing_target_layer_name is not None
            or attention.attn.query_quant is not None
        ):
            return False
    has_hooks = any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )
    return not has_hooks and all(
        type(norm) is RMSNorm and norm.pass_weight and norm.variance_size_override is None
        for norm in norms
    )


class EagerTarget:
    """In place of a loaded ``Qwen3Model``'s ``forward``."""

    def __init__(self, model: Any) -> None:
        self._model, self._modules = model, model.forward
        self._embed = embedding(model)
        self._layers = [_TargetLayer(layer) for layer in model.layers]
        self._names = [layer.self_attn.attn.layer_name for layer in model.layers]
        self._norm = live(model.norm)
        self._joined = [part for layer in self._layers for part in layer.joined_parts]
        self._head_norms = [norm for layer in self._layers for norm in (layer.q_norm, layer.k_norm)]

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As the model's ``forward``: ``input_ids`` [N] int32, ``positions`` [N] int64 -> [N, H],
        with T features [N, H] where they are asked for."""
        context = get_forward_context() if is_forward_context_available() else None
        metadata, slots = (
            (None, None) if context is None else (context.attn_metadata, context.slot_mapping)
        )
        if (
            input_ids is None
            or inputs_embeds is not None
            or not (isinstance(metadata, dict) and isinstance(slots, dict))
        ):
            return self._modules(input_ids, positions, intermediate_tensors, inputs_embeds)
        if any(
            slots.get(name) is None or metadata[name].num_actual_tokens != len(input_ids)
            for name in self._names
        ):
            return self._modules(input_ids, positions, intermediate_tensors, inputs_embeds)
        taps, features = self._model.aux_hidden_state_layers, []
        # Anew in each step, 1 us a layer: whatever has changed a weight, no trace of it is left
        # that could be looked for.
        torch._foreach_copy_(self._joined, [norm["weight"] for norm in self._head_norms])
        residual = self._embed(input_ids)
        first = self._layers[0]
        workspace, hidden = (
            Workspace(first, residual),
            first.norm(residual, first.input_norm["weight"]),
        )
        for index, (layer, name) in enumerate(zip(self._layers, self._names, strict=True)):
            if index:
                hidden, residual = layer.norm_sum(hidden, residual, layer.input_norm["weight"])
            if index in taps:
                features.append(residual)
            hidden, residual = layer(positions, hidden, residual, slots[name], metadata, workspace)
        hidden, residual = self._layers[-1].norm_sum(hidden, residual, self._norm["weight"])
        if len(self._layers) in taps:
            features.append(residual)
        return (hidden, features) if features else hidden


class _TargetLayer(Layer):
    """Norms are what vLLM's modules compute: in float32, rounded to the weight's dtype before the
    weight is applied."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        weight = self.q_norm["weight"]
        self._is_float, self._num_heads = (
            weight.dtype == torch.float32,
            self.q_size // self.head_dim,
        )
        num_keys = layer.self_attn.kv_size // self.head_dim
        self._qk_weight = torch.empty(self._num_heads + num_keys, self.head_dim, dtype=weight.dtype)
        """[heads, head_dim]: the weights of both norms, for one multiplication."""
        self.joined_parts = self._qk_weight[: self._num_heads], self._qk_weight[self._num_heads :]
        """Of the queries and of the keys: every forward writes them first."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` [N, H], normed; in 16 bits it may still be in float32, as a sum is."""
        if self._is_float:
            return torch.rms_norm(x, weight.shape, weight, self.eps)
        return torch.rms_norm(x.float(), weight.shape, None, self.eps).to(weight.dtype) * weight

    def heads(self, qk: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        normed = torch.rms_norm(
            qk if self._is_float else qk.float(), (self.head_dim,), None, self.eps
        )
        both = (normed if self._is_float else normed.to(qk.dtype)).mul_(self._qk_weight)
        self.rotate(positions, both.view(len(both), -1), None)
        return both[:, : self._num_heads], both[:, self._num_heads :]

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_float:
            residual = hidden + residual
            return torch.rms_norm(residual, weight.shape, weight, self.eps), residual
        total = hidden.float() + residual.float()
        return self.norm(total, weight), total.to(weight.dtype)

"""The target's layers on a CPU without compilation: the same operations as vLLM's modules, to the
last bit, with less between them.

With one request, half of the target's forward is Python between small operators, seven for each
norm and a dozen calls for each attention (docs/performance.md). A norm is one call here, which does
the same arithmetic in the same order, so that the target writes what it writes without a drafter.
Limits: Qwen3 and Llama, by vLLM's very own classes (``ARCHITECTURES``), not what extends them, and
those of ``layers.py``; elsewhere, and in steps with embeddings for input, the modules run.

    pytest tests/engine/test_target_layers.py tests/engine/test_reload.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_dflash.cpu.dispatch import (
    Untouched,
    foreign_classes,
    leave_out,
    other_choices,
    other_norms,
)
from vllm_dflash.cpu.layers import Layer, Workspace, can_run, embedding, live
from vllm_dflash.patch import Patch
from vllm_dflash.patches import cpu_target
from vllm_dflash.plugin import patch_set


@dataclass(frozen=True)
class _Architecture:
    """vLLM's classes of one architecture. The layers below compute what all of them do; they differ
    in whether an attention has norms of its heads and in which projections have biases, and both
    are seen in the modules."""

    model: type
    layer: type
    attention: type
    mlp: type

    def is_of(self, model: Any) -> bool:
        """Whether these very classes made the model and each of its layers."""
        layers = {(type(layer), type(layer.self_attn), type(layer.mlp)) for layer in model.layers}
        return (type(model), layers) == (self.model, {(self.layer, self.attention, self.mlp)})


def _qwen3() -> dict[type, _Architecture]:
    from vllm.model_executor.models.qwen2 import Qwen2MLP
    from vllm.model_executor.models.qwen3 import (
        Qwen3Attention,
        Qwen3DecoderLayer,
        Qwen3ForCausalLM,
        Qwen3Model,
    )

    return {
        Qwen3ForCausalLM: _Architecture(Qwen3Model, Qwen3DecoderLayer, Qwen3Attention, Qwen2MLP)
    }


def _llama() -> dict[type, _Architecture]:
    from vllm.model_executor.models.llama import (
        LlamaAttention,
        LlamaDecoderLayer,
        LlamaForCausalLM,
        LlamaMLP,
        LlamaModel,
    )

    return {
        LlamaForCausalLM: _Architecture(LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP)
    }


ARCHITECTURES = {cpu_target.QWEN3: _qwen3, cpu_target.LLAMA: _llama}
"""By the record of what is repeated. Each imports its own, so that each drops out alone."""


def use_eager_layers(target: Any, record: Patch) -> bool:
    """Lets a loaded target model of a record's architecture run its layers by this module's class;
    returns whether they fit it."""
    # By class: those that extend these also change what is inside, as Ernie 4.5 does of Llama.
    architecture = ARCHITECTURES[record]().get(type(target))
    if architecture is None:
        return False
    model = target.model
    fits = architecture.is_of(model) and can_run(model)
    if (why := next(_unknown(model) if fits else foreign_classes(model), None)) is not None:
        leave_out(f"the kernels of {record.target}", why)
        return False
    return fits and patch_set().attach(model, [record], model)


def _unknown(model: Any) -> Iterator[str]:
    """What of the model's layers is not vLLM's own, as its class says, or not what vLLM would run;
    and what listens to them."""
    norms = [model.norm]
    for layer in model.layers:
        attention = layer.self_attn
        norms += [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
        if type(attention.attn) is not Attention:
            yield f"an attention is {type(attention.attn).__qualname__}"
        if (
            attention.attn.kv_sharing_target_layer_name is not None
            or attention.attn.query_quant is not None
        ):
            yield "an attention shares another's cache, or quantizes its queries"
    if type(model.embed_tokens) is not VocabParallelEmbedding:
        yield f"the embedding is {type(model.embed_tokens).__qualname__}"
    yield from other_choices(model)
    yield from other_norms(norms)
    if (model.start_layer, model.end_layer) != (0, len(model.layers)):
        yield f"it runs layers {model.start_layer} to {model.end_layer} only"
    yield from Untouched(model).touched()


def _head_norms(attention: Any) -> list[Any]:
    """The norms of queries and of keys; Llama has none."""
    return [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]


class EagerTarget:
    """In place of the ``forward`` of a loaded model of ``ARCHITECTURES``."""

    def __init__(self, model: Any) -> None:
        self._model, self._modules = model, model.forward
        self._untouched = Untouched(model)
        self._embed = embedding(model)
        self._layers = [_TargetLayer(layer) for layer in model.layers]
        self._workspace = Workspace(self._layers[0])
        self._names = [layer.self_attn.attn.layer_name for layer in model.layers]
        self._norm = live(model.norm)
        self._joined = [part for layer in self._layers for part in layer.joined_parts]
        self._head_norms = [norm for layer in self._layers for norm in layer.head_norms]

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """As the model's ``forward``: ``input_ids`` [N] int32, ``positions`` [N] int64 -> [N, H],
        with T features [N, H] where they are asked for. ``others`` are the modules' to know."""
        context = get_forward_context() if is_forward_context_available() else None
        metadata, slots = (
            (None, None) if context is None else (context.attn_metadata, context.slot_mapping)
        )
        if (
            input_ids is None
            or inputs_embeds is not None
            or others
            or not (isinstance(metadata, dict) and isinstance(slots, dict))
            or not self._untouched
        ):
            return self._modules(
                input_ids, positions, intermediate_tensors, inputs_embeds, **others
            )
        count = input_ids.shape[0]
        if any(
            slots.get(name) is None or metadata[name].num_actual_tokens != count
            for name in self._names
        ):
            return self._modules(input_ids, positions, intermediate_tensors, inputs_embeds)
        taps, features = self._model.aux_hidden_state_layers, []
        # Anew in each step, 1 us a layer: whatever has changed a weight, no trace of it is left
        # that could be looked for.
        if self._joined:
            torch._foreach_copy_(self._joined, [norm["weight"] for norm in self._head_norms])
        residual = self._embed(input_ids)
        first = self._layers[0]
        workspace, hidden = (
            self._workspace.of(residual),
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
        dtype = self.input_norm["weight"].dtype
        self._is_float, self._num_heads = dtype == torch.float32, self.q_size // self.head_dim
        self.head_norms = [live(norm) for norm in _head_norms(layer.self_attn)]
        """Of the queries and of the keys, or none."""
        counts = [self._num_heads, layer.self_attn.kv_size // self.head_dim]
        self._qk_weight = torch.empty(sum(counts), self.head_dim, dtype=dtype)
        """[heads, head_dim]: the weights of both norms, for one multiplication."""
        self.joined_parts = self._qk_weight.split(counts) if self.head_norms else ()
        """Of each of ``head_norms``: every forward writes them first."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` [N, H], normed; in 16 bits it may still be in float32, as a sum is."""
        if self._is_float:
            return torch.rms_norm(x, weight.shape, weight, self.eps)
        return torch.rms_norm(x.float(), weight.shape, None, self.eps).to(weight.dtype) * weight

    def heads(self, qk: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Without norms ``qk`` is rotated where it lies, as vLLM's attention does."""
        both = self._normed_heads(qk) if self.head_norms else qk
        self.rotate(positions, both.view(both.shape[0], -1), None)
        return both[:, : self._num_heads], both[:, self._num_heads :]

    def _normed_heads(self, qk: Tensor) -> Tensor:
        normed = torch.rms_norm(
            qk if self._is_float else qk.float(), (self.head_dim,), None, self.eps
        )
        return (normed if self._is_float else normed.to(qk.dtype)).mul_(self._qk_weight)

    def norm_sum(self, hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_float:
            residual = hidden + residual
            return torch.rms_norm(residual, weight.shape, weight, self.eps), residual
        total = hidden.float() + residual.float()
        return self.norm(total, weight), total.to(weight.dtype)

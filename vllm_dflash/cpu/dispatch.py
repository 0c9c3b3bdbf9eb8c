"""Which of several implementations vLLM itself would run, where code of ours runs in its place.

A record's fingerprints say what an implementation does, not that it is the one that is chosen: the
processor, an option such as ``--ir-op-priority`` or ``custom_ops``, or another plug-in's class may
choose another. Asked once an engine, when its model is loaded.

    pytest tests/unit/test_dispatch.py tests/engine/test_other_choices.py
"""

from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
import torch.nn.modules.module as _torch_modules
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.utils import cpu_unquantized_gemm
from vllm.platforms import CpuArchEnum, current_platform

from vllm_dflash.cpu.sampler_choice import named
from vllm_dflash.log import logger
from vllm_dflash.patching import LEFT_OUT
from vllm_dflash.replaced import replaced_by, shadowed
from vllm_dflash.worker_calls import CALLS

_CALL = torch.nn.Module.__call__
_FORWARDS = repeat("forward")
_RUNS = attrgetter("forward", "__call__")
_KNOWN = frozenset({"vllm", "torch", "builtins", __name__.partition(".")[0]})
_LINEAR = ColumnParallelLinear.forward, ReplicatedLinear.forward, RowParallelLinear.forward


def ends_in(module: Any, *functions: Any) -> bool:
    """Whether a call of a ``CustomOp`` is, by vLLM's own dispatch, one of these functions: a class
    may have another ``forward``, or what ``forward`` chooses from, of its own."""
    method = getattr(module, "_forward_method", None)
    return has_forward(module, CustomOp.forward) and getattr(method, "__func__", method) in (
        functions
    )


def has_forward(module: Any, *functions: Any) -> bool:
    """Whether ``forward`` is one of these functions: neither its class nor the module itself has
    another."""
    return type(module).forward in functions and "forward" not in vars(module)


def is_cpu_linear(projection: Any) -> bool:
    """Whether a call of a projection is one of its ``cpu_linear``, which vLLM makes of its
    weight."""
    method: Any = getattr(projection, "quant_method", None)
    return (
        has_forward(projection, *_LINEAR)
        and type(method) is UnquantizedLinearMethod
        and method._gemm_impl is cpu_unquantized_gemm
        and hasattr(projection, "cpu_linear")
    )


def only_projects(processor: Any) -> bool:
    """Whether a drafter's ``LogitsProcessor`` only multiplies by the head and drops padding."""
    return (
        type(processor) is LogitsProcessor
        and has_forward(processor, LogitsProcessor.forward)
        and processor.soft_cap is None
        and processor.scale == 1.0
        and not processor.logits_as_input
    )


def other_choices(model: Any) -> Iterator[str]:
    """What vLLM chose otherwise than what ``Layer`` repeats of a loaded model's activations and
    rotations."""
    for layer in model.layers:
        activation, rotary = layer.mlp.act_fn, layer.self_attn.rotary_emb
        if type(activation) is not SiluAndMul or not ends_in(
            activation, SiluAndMul.forward_cpu, SiluAndMul.forward_native
        ):
            yield f"the activation runs {_name(activation)}"
        if not ends_in(rotary, RotaryEmbedding.forward_cpu):
            yield f"the rotation runs {_name(rotary)}"
    # There ``SiluAndMul.forward_cpu`` runs a kernel of its own.
    if current_platform.get_cpu_architecture() == CpuArchEnum.POWERPC:
        yield "the activation runs POWERPC's kernel"


def other_norms(norms: list[Any]) -> Iterator[str]:
    """What vLLM chose otherwise than its native RMSNorm, operator by operator."""
    for norm in norms:
        if (
            type(norm) is not RMSNorm
            or not ends_in(norm, CustomOp.forward_cpu, RMSNorm.forward_native)
            or not (norm.pass_weight and norm.pass_weight_add)
            or norm.variance_size_override is not None
        ):
            yield f"a norm runs {_name(norm)}"
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        first = next(iter(op.get_priority()), "native")  # no priority at all is native too
        if first != "native":
            yield f"vLLM's IR op {op.name} runs {first}, not native"


def foreign_classes(model: Any) -> Iterator[str]:
    """Which classes of a loaded model's layers, and of what runs in them, are neither vLLM's,
    torch's nor ours: another plug-in's are not repeated. Under compilation nothing is anyway."""
    if not getattr(model, "do_not_compile", False):
        return
    for name, module in model.layers.named_modules(prefix="layers"):
        for part in _with_what_it_runs(module):
            kind = type(part)
            if kind.__module__.partition(".")[0] not in _KNOWN:
                yield f"{name} runs {kind.__module__}.{kind.__qualname__}"


class Untouched:
    """Whether a loaded model's modules are what their classes say, and nobody listens to them: true
    or false, at any time. ``llm.apply_model`` may register a hook or set a method in a running
    engine.

    Asked for each forward, so it looks at no more than is needed. Where no code but vLLM's and ours
    can have reached the model, once is enough. A look is at each ``forward``, and at how many
    attributes a module has: one with another method of its own has more than it had, and which they
    are is looked at only then. Limit: where an attribute is taken away too, between the same two
    forwards, another method than ``forward`` is not seen. What a look costs is memory that no cache
    holds by then: in an engine several times as much as in a loop of its own.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        modules = list(model.modules())
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ] + [_torch_modules._global_forward_hooks, _torch_modules._global_forward_pre_hooks]
        # The model's own ``forward`` is what ours stands in the place of.
        modules.remove(model)
        self._parts = [part for module in modules for part in _with_what_it_runs(module)]
        self._attributes = [vars(part).keys() for part in self._parts]
        self._counts = [0] * len(self._parts)
        self._replaced: set[int] = set()
        """Which of the parts had methods of their own when they had as many attributes."""
        self._kinds = list({type(module) for module in modules})
        self._runs = [(kind.forward, _CALL) for kind in self._kinds]
        self._range = _range_of(model)
        self._held_once = False
        """Whether it was so once, while no other code could change it."""

    def __bool__(self) -> bool:
        if CALLS.none_other and self._held_once:
            return True
        found = self._look()
        self._held_once = found and CALLS.none_other
        return found

    def _look(self) -> bool:
        if (counts := [*map(len, self._attributes)]) != self._counts:
            self._look_again(counts)
        return not (
            self._replaced
            or any(map(contains, self._attributes, _FORWARDS))
            or any(self._hooks)
            or [*map(_RUNS, self._kinds)] != self._runs
            or _range_of(self._model) != self._range
        )

    def _look_again(self, counts: list[int]) -> None:
        for index, (now, before) in enumerate(zip(counts, self._counts, strict=True)):
            if now != before and shadowed(self._parts[index]) is not None:
                self._replaced.add(index)
            elif now != before:
                self._replaced.discard(index)
        self._counts = counts

    def touched(self) -> Iterator[str]:
        """What is not as the classes say, in words; more than is asked for each forward."""
        if any(self._hooks[-2:]):
            yield "torch's modules have hooks"
        calls = [
            found
            for name in ("__call__", "_wrapped_call_impl", "_call_impl")
            if (found := replaced_by(f"torch.nn.modules.module:Module.{name}")) is not None
        ]
        if not calls and torch.nn.Module.__call__ is not _CALL:
            calls = [named(torch.nn.Module.__call__)]
        yield from (f"torch's modules run {found}" for found in calls)
        if _range_of(self._model) != self._range:
            yield "which layers it runs was set anew"
        for name, module in self._model.named_modules():
            what = name or "the model"
            if module._forward_hooks or module._forward_pre_hooks:
                yield f"{what} has hooks"
            for part in _with_what_it_runs(module):
                if (own := shadowed(part)) is not None:
                    of = what if part is module else f"the {type(part).__qualname__} of {what}"
                    yield f"the {own} of {of} was replaced"
            called = type(module).__call__
            if module is not self._model and called not in (_CALL, torch.nn.Module.__call__):
                yield f"{type(module).__qualname__} has a __call__ of its own"


def _with_what_it_runs(module: Any) -> list[Any]:
    """A module, and the objects that compute for it: its weight's method, an attention's
    backend."""
    parts = (getattr(module, name, None) for name in ("quant_method", "impl"))
    return [module, *(part for part in parts if hasattr(part, "__dict__"))]


def _range_of(model: Any) -> tuple[Any, Any]:
    """The first of the layers that it runs, and the one after the last."""
    return vars(model).get("start_layer"), vars(model).get("end_layer")


def _name(module: Any) -> str:
    """Of what a call of a ``CustomOp`` ends in, as far as it is known."""
    method = vars(module).get("forward", type(module).forward)
    if method is CustomOp.forward:
        method = module._forward_method
    return named(method)


def leave_out(what: str, why: str) -> None:
    """Says that vLLM's own runs in this engine where ours could have."""
    logger.warning(LEFT_OUT, f"{what} in this engine, because {why}")

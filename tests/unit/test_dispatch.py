"""Which implementation vLLM would run is asked of vLLM, not taken for granted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CompilationConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from vllm_dflash.cpu.dispatch import (
    Untouched,
    foreign_classes,
    is_cpu_linear,
    only_projects,
    other_choices,
    other_norms,
)
from vllm_dflash.cpu.sampler_choice import check_sampler, draws_by_kernel, is_as_checked
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.models.norm import ServedRMSNorm

pytestmark = pytest.mark.vllm
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(autouse=True)
def config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0))):
        yield


def model() -> Any:
    rotary = get_rope(64, max_position=64, is_neox_style=True, rope_parameters=ROPE)
    layer = SimpleNamespace(
        mlp=SimpleNamespace(act_fn=SiluAndMul()), self_attn=SimpleNamespace(rotary_emb=rotary)
    )
    return SimpleNamespace(layers=[layer])


def test_vllms_own_choices_on_this_processor_are_repeated() -> None:
    assert list(other_choices(model())) == []
    assert list(other_norms([RMSNorm(8)])) == []
    assert only_projects(LogitsProcessor(16))
    assert draws_by_kernel(TopKTopPSampler())


@pytest.mark.parametrize("name", ["rms_norm", "fused_add_rms_norm"])
def test_another_implementation_of_an_operator_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``--ir-op-priority`` or a platform's default may choose; one that this processor lacks is
    not chosen."""
    op = getattr(ir.ops, name)
    monkeypatch.setattr(op, "impls", dict(op.impls))
    op.register_impl("lacking", supported=False)(op.impls["native"].impl_fn)
    op.register_impl("mine")(op.impls["native"].impl_fn)
    with op.set_priority(["lacking", "native"]):
        assert list(other_norms([])) == []
    with op.set_priority(["mine"]):
        assert list(other_norms([])) == [f"vLLM's IR op {name} runs mine, not native"]


def test_a_forward_of_another_class_or_of_the_module_itself_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class RMSNormOfAnother(RMSNorm):
        def forward_cpu(self, *args: Any) -> Any:
            return self.forward_native(*args)

    assert next(other_norms([RMSNormOfAnother(8)])).endswith("RMSNormOfAnother.forward_cpu")
    made = model()  # whose rotation vLLM keeps for the next
    monkeypatch.setitem(vars(made.layers[0].self_attn.rotary_emb), "forward", print)
    assert list(other_choices(made)) == ["the rotation runs print"]


def test_power_has_an_activation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method that is called is the same; what it calls is not."""
    made = model()
    monkeypatch.setattr(current_platform, "get_cpu_architecture", lambda: CpuArchEnum.POWERPC)
    assert list(other_choices(made)) == ["the activation runs POWERPC's kernel"]


def test_logits_that_are_more_than_a_product_are_seen() -> None:
    class Another(LogitsProcessor):
        def forward(self, *args: Any) -> Any:
            return None

    assert not only_projects(Another(16))
    assert not only_projects(LogitsProcessor(16, scale=0.5))
    assert not only_projects(LogitsProcessor(16, soft_cap=30.0))


def test_a_projection_with_another_kernel_is_seen() -> None:
    from vllm.distributed import parallel_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))
        linear = ReplicatedLinear(8, 8, params_dtype=torch.float32)
    assert not is_cpu_linear(linear)  # nothing is loaded
    linear.cpu_linear = torch.nn.functional.linear
    assert is_cpu_linear(linear)
    linear.quant_method._gemm_impl = print
    assert not is_cpu_linear(linear)


@pytest.mark.parametrize("architecture", [CpuArchEnum.POWERPC, CpuArchEnum.RISCV])
def test_another_processors_sampler_is_seen(
    architecture: CpuArchEnum, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_platform, "get_cpu_architecture", lambda: architecture)
    assert not draws_by_kernel(TopKTopPSampler())


def test_another_sampler_than_vllms_is_refused() -> None:
    class Another(Sampler):
        pass

    def sample(*args: Any) -> None:
        """In place of the method."""

    check_sampler(Sampler())
    with pytest.raises(DrafterConfigError, match=r"sampler is .*Another, not vLLM's.*without"):
        check_sampler(Another())
    replaced = Sampler()
    replaced.sample = sample  # type: ignore[method-assign,assignment]
    with pytest.raises(DrafterConfigError, match=r"sampler is .*sample, not vLLM's.*without"):
        check_sampler(replaced)


def test_another_plug_ins_norm_is_not_made_in_place_of_the_drafters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM looks for a replacement by the class's name: the drafter's norm had that of vLLM's, and
    was made as the other class, without a weight."""

    class Another(RMSNorm):
        pass

    monkeypatch.setitem(op_registry_oot, "RMSNorm", Another)
    assert type(RMSNorm(8)) is Another
    norm = ServedRMSNorm(8)
    assert type(norm) is ServedRMSNorm
    assert norm.weight.shape == (8,)


def test_noise_in_float64_is_not_the_kernels() -> None:
    assert not draws_by_kernel(TopKTopPSampler(use_fp64_gumbel=True))


class Computes:
    """As a weight's method, or an attention's backend, does for its module."""

    def apply(self, x: Any) -> Any:
        return x


class Layered(torch.nn.Module):
    """A model of two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.first.quant_method, self.second.impl = Computes(), Computes()
        self.start_layer, self.end_layer = 0, 2


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model.first.register_forward_hook(print),
        lambda model: model.first.register_forward_pre_hook(print),
        lambda model: model.register_forward_hook(print),
        lambda model: setattr(model.second, "forward", print),
        lambda model: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda model: setattr(model.second, "extra_repr", print),
        lambda model: setattr(model.first.quant_method, "apply", print),
        lambda model: setattr(model.second.impl, "apply", print),
        lambda model: setattr(model, "end_layer", 1),
    ],
    ids=[
        "hook",
        "pre-hook",
        "the model's hook",
        "forward",
        "hook of all modules",
        "method",
        "method of a weight's",
        "method of a backend",
        "fewer layers",
    ],
)
def test_what_is_done_to_a_loaded_model_is_seen_at_its_next_forward(touch: Any) -> None:
    """``llm.apply_model`` is a way to steer and to probe: a hook that came after the fast layers
    was never called. Nor was a method that was set later, or which layers it runs, heeded."""
    model = Layered()
    untouched = Untouched(model)
    assert untouched
    assert list(untouched.touched()) == []
    handle = touch(model)
    for _ in range(2):
        assert not untouched
        assert len(list(untouched.touched())) == 1
    for part in (model.second, model.first.quant_method, model.second.impl):
        for name in ("forward", "apply", "extra_repr"):
            vars(part).pop(name, None)
    if handle is not None:
        handle.remove()
    model.end_layer = 2
    assert untouched


def test_an_attribute_that_is_no_method_changes_nothing() -> None:
    """vLLM binds a cache to a layer, and takes over kernels after a load."""
    model = Layered()
    untouched = Untouched(model)
    model.first.kv_cache = torch.zeros(1)
    assert untouched
    model.first.forward = print
    assert not untouched
    del model.first.kv_cache
    assert not untouched
    del model.first.forward
    assert untouched


def test_a_forward_in_the_place_of_an_attribute_is_seen() -> None:
    """The module has as many attributes as before."""
    model = Layered()
    model.first.marked = True
    untouched = Untouched(model)
    assert untouched
    del model.first.marked
    model.first.forward = print
    assert not untouched
    del model.first.forward
    assert untouched


def test_a_class_of_another_package_is_named() -> None:
    """The fast layers stayed out without a word."""

    class Another(torch.nn.Linear):
        """Of another plug-in."""

    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(), RMSNorm(2))
    model = SimpleNamespace(layers=layers, do_not_compile=True)
    assert list(foreign_classes(model)) == []
    layers.append(Another(2, 2))
    layers[0].quant_method = Computes()
    named = list(foreign_classes(model))
    assert [said.partition(" runs ")[0] for said in named] == ["layers.0", "layers.3"]
    assert named[0].endswith("test_dispatch.Computes")
    assert named[1].endswith("Another")
    model.do_not_compile = False
    assert list(foreign_classes(model)) == []


def test_a_method_of_the_class_that_was_set_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = Untouched(Layered())
    with monkeypatch.context() as later:
        later.setattr(torch.nn.Linear, "forward", print)
        assert not untouched
    with monkeypatch.context() as later:
        later.setattr(torch.nn.Module, "__call__", lambda *_: None)
        assert not untouched
        [said] = untouched.touched()  # it was said of each class too
        assert said.startswith("torch's modules run")
    with monkeypatch.context() as later:
        later.setattr(torch.nn.Module, "_call_impl", lambda *_: None)
        assert "torch's modules run" in " ".join(untouched.touched())
    with monkeypatch.context() as later:  # as transformers does, and no forward calls it
        later.setattr(torch.nn.Module, "smart_apply", lambda *_: None, raising=False)
        assert list(untouched.touched()) == []
    assert untouched


@pytest.mark.parametrize(
    "touch",
    [
        lambda sampler: setattr(sampler, "apply_logits_processors", print),
        lambda sampler: setattr(sampler, "greedy_sample", print),
        lambda sampler: setattr(sampler, "forward", print),
        lambda sampler: sampler.register_forward_pre_hook(print),
        lambda sampler: sampler.topk_topp_sampler.register_forward_hook(print),
    ],
    ids=["processors", "greedy", "forward", "hook", "inner hook"],
)
def test_what_is_put_around_the_sampler_is_refused_at_any_time(touch: Any) -> None:
    """Verification repeats how it samples."""
    sampler = Sampler()
    check_sampler(sampler)
    assert is_as_checked(sampler)
    touch(sampler)
    assert not is_as_checked(sampler)
    with pytest.raises(DrafterConfigError, match=r"not vLLM's.*serve without"):
        check_sampler(sampler)


def test_a_call_of_the_samplers_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "__call__", print)
    with pytest.raises(DrafterConfigError, match="__call__"):
        check_sampler(Sampler())

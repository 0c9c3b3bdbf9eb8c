"""Every replacement in vLLM is on record: nothing else sets an attribute of a foreign object, and
each record can be taken back."""

import ast
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from vllm_dflash.patches import ALL, cpu_layers, cpu_target, v1_draft_metadata, v1_verifier

import foreign
from vllm_dflash.upstream import Definition, SourceNotFoundError, Sources

ROOT = Path(__file__).resolve().parents[2]
OURS = """
import copy
from typing import Any
from package.parts import Part
from other.parts import Part as Foreign

class Holder:
    part: Part
    def __init__(self, runner: Any, parts: list[Part]) -> None:
        self.mine, self.runner, self.copied = Part(), runner, copy.copy(runner)
        self.parts: dict[str, Part] = {}
        self.a = 1

def build() -> "Part":
    ...
"""


def stores(body: str) -> list[str]:
    """What the rule says of a function's body; the names are those of ``OURS``, and ``holder`` and
    ``runner`` its parameters."""
    source = (
        OURS
        + "\ndef f(holder: Holder, runner: Any, module: Any) -> None:\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    parts = "class Part:\n    x: int\n    def twin(self) -> 'Part': ...\n"
    trees = {Path("package/parts.py"): ast.parse(parts), Path("package/use.py"): ast.parse(source)}
    return list(foreign.foreign_stores(foreign.Package(trees)))


@pytest.mark.parametrize(
    "body",
    [
        "runner.sampler = 1",
        "runner.a.b.c += 1",
        "holder.runner.sampler = 1",
        "setattr(runner, 'sampler', 1)",
        "setattr(holder.runner, 'sampler', 1)",
        "object.__setattr__(runner, 'sampler', 1)",
        "del runner.sampler",
        "vars(runner)['sampler'] = 1",
        "runner.__dict__['sampler'] = 1",
        "vars(runner).update(sampler=1)",
        "for runner.sampler in []: pass",
        "one, runner.sampler = 1, 2",
        "with open('x') as runner.file: pass",
        "part = Part()\npart = runner\npart.x = 1",
        "part = Foreign()\npart.x = 1",
        "part = runner.build()\npart.x = 1",
        "def inner():\n    runner.sampler = 1",
        "import vllm\nvllm.x = 1",
        "d = runner.__dict__\nd['a'] = 1",
        "d = vars(runner)\nd['a'] = 1",
        "d = getattr(runner, '__dict__')\nd.update(a=1)",
        "vars(runner).__ior__({'a': 1})",
        "vars(runner).__setitem__('a', 1)",
        "del vars(runner)['a']",
        "dict.update(runner.__dict__, a=1)",
        "operator.setitem(vars(runner), 'a', 1)",
        "holder.table = vars(runner)",
        "s = setattr\ns(runner, 'a', 1)",
        "partial(setattr, runner)('a', 1)",
        "list(map(setattr, [runner], ['a'], [1]))",
        "setattr(*module.arguments)",
        "setattr(runner, *module.rest)",
        "builtins.setattr(runner, 'a', 1)",
        "runner.__setattr__('a', 1)",
        "runner.__delattr__('a')",
        "type(runner).__setattr__(runner, 'a', 1)",
        "object.__setattr__(*module.arguments)",
        "store = runner.__setattr__",
        "getattr(runner, '__setattr__')('a', 1)",
        "cls = type(runner)\ncls.a = 1",
        "for cls in module.classes: cls.a = 1",
        "self = runner\nself.a = 1",
        "def g(self): self.a = 1",
        "g = lambda self: setattr(self, 'a', 1)",
        "class Mine:\n    def g(self):\n        self = runner\n        self.a = 1",
        "class Mine:\n    def g(self):\n        cls = type(runner)\n        cls.a = 1",
        "class Mine:\n    def g(self):\n        for cls in runner.classes: cls.a = 1",
        "class Mine:\n    def g(self):\n        def inner(self): self.a = 1",
        "class Mine:\n    @staticmethod\n    def g(self): self.a = 1",
        "mock.patch.object(runner, 'a', 1).start()",
        "patch.object(runner, 'a', 1).start()",
        "mock.patch('vllm.x').start()",
        "from unittest.mock import patch",
        "sys.modules['vllm.x'] = module",
        "sys.modules.pop('vllm.x')",
        "from sys import modules",
        "runner.build.__globals__['a'] = 1",
        "exec('runner.a = 1')",
        "x: Part | Foreign = module.x\nx.a = 1",
        "pairs: list[tuple[Part, Any]] = module.pairs\npairs[0][1].a = 1",
        "class Runner(Protocol):\n    sampler: Any\nr: Runner = runner\nr.sampler = 1",
        "part: Part\npart = runner\npart.a = 1",
        "part = Part()\ndef inner():\n    nonlocal part\n    part = runner\npart.a = 1",
        "part = Part()\nmatch runner:\n    case part:\n        part.a = 1",
        "async def g():\n    async for part in runner: part.a = 1",
        "part = Part()\nfrom vllm import part\npart.a = 1",
        "holder.mine = runner\nholder.mine.a = 1",
        "copy.copy(Foreign).forward = 1",
        "import sys as s\ns.modules['vllm.x'] = 1",
        "importlib.sys.modules['vllm.x'] = 1",
        "from sys import *",
        "from builtins import setattr as put\nput(runner, 'a', 1)",
        "from builtins import exec as run\nrun('runner.a = 1')",
        "getattr(builtins, module.name)(runner, 'a', 1)",
        "__builtins__['setattr'](runner, 'a', 1)",
        "from unittest import mock as m\nm.patch('vllm.x')",
        "table = vars\ntable(runner)['a'] = 1",
        "run = exec\nrun('runner.a = 1')",
        "runner.build.__kwdefaults__['a'] = 1",
        "sys._getframe(1).f_globals['a'] = 1",
        "type(runner).a.__set__(runner, 1)",
        "type(runner).a.fset(runner, 1)",
    ],
)
def test_the_rule_finds_a_store_into_what_is_not_ours(body: str) -> None:
    assert len(stores(body)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "holder.a = 1",
        "holder.mine.x = 1",
        "holder.part.x += 1",
        "part = Part()\npart.x = 1",
        "part = build()\npart.x = 1",
        "part = build().twin()\npart.x = 1",
        "for part in holder.parts.values(): part.x = 1",
        "for name, part in holder.parts.items(): part.x = 1",
        "part = holder.parts.get('a') or Part()\npart.x = 1",
        "own = copy.copy(runner)\nown.sampler = 1",
        "part: Part = module.make()\npart.x = 1",
        "table = {}\ntable['x'] = 1",
        "d = vars(holder)\nd['a'] = 1",
        "d = dict(vars(runner))\nd['a'] = 1",
        "x = vars(runner)['a'], vars(runner).get('a'), 'a' in vars(runner)",
        "x = {**vars(runner)}\nf(**vars(runner))",
        "for name, value in vars(runner).items(): x = value",
        "module = sys.modules['vllm.x']",
        "setattr(holder, 'a', 1)",
        "object.__setattr__(holder, 'a', 1)",
        "holder.__setattr__('a', 1)",
        "module.model.eval()",
        "import torch as t, vllm.x as y",
        "type(holder).a.fset(holder, 1)",
        "x = runner.build.__annotations__.get('a')",
        "class Mine:\n    def g(this):\n        def inner(): this.a = 1",
        "class Mine:\n    def __setattr__(self, n, v): super().__setattr__(n, v)",
        "class Mine:\n    @classmethod\n    def g(cls): cls.a = 1",
        "part: Part | None = module.x\npart.a = 1",
        "parts: dict[str, list[Part]] = module.parts\nparts['a'][0].x = 1",
        "parts: tuple[Part, ...] = module.parts\nparts[0].x = 1",
        "async def g():\n    async for part in holder.parts: part.x = 1",
    ],
)
def test_the_rule_lets_stores_into_our_own_objects_be(body: str) -> None:
    assert stores(body) == []


def test_outside_of_patches_no_attribute_of_a_foreign_object_is_set() -> None:
    """The rule stands in ``foreign.py``. The metrics, the verifier and the target's forward were
    once put in place from everywhere."""
    assert list(foreign.foreign_stores(foreign.read(ROOT / "vllm_dflash"))) == []


def test_every_class_of_vllms_that_we_extend_or_repeat_is_named_in_a_record() -> None:
    """Extended: a base of a class of ours. Repeated: code that asks by identity whether an object's
    class is vLLM's very own, or has a table of such classes."""
    sources, used = Sources(), {}
    for path in sorted((ROOT / "vllm_dflash").rglob("*.py")):
        for name in _extended_or_repeated(ast.parse(path.read_text())):
            used.setdefault(name, path.relative_to(ROOT))
    assert "vllm.v1.sample.rejection_sampler:RejectionSampler" in used
    for name in (
        "qwen3:Qwen3Model",
        "qwen3:Qwen3ForCausalLM",
        "llama:LlamaModel",
        "llama:LlamaMLP",
    ):
        assert f"vllm.model_executor.models.{name}" in used
    named = {
        _class_of(sources, key)
        for record in ALL
        for key in (*record.fingerprints, *record.signatures)
    }
    missing = [
        f"{path}: {name}"
        for name, path in used.items()
        if not named & set(_with_bases(sources, name))
    ]
    assert missing == []


def _extended_or_repeated(tree: ast.Module) -> Iterator[str]:
    imported = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
        for alias in node.names
    }

    def names(node: ast.expr) -> Iterator[str]:
        match node:
            case ast.Name(id=name) if name in imported:
                yield imported[name]
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in imported:
                module, _, inner = imported[name].partition(":")
                # A member of a class, or of a module that was imported by name.
                yield imported[name] if inner[:1].isupper() else f"{module}.{inner}:{attribute}"
            case ast.Tuple(elts=elements):
                for element in elements:
                    yield from names(element)

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                yield from names(base)
        if isinstance(node, ast.Compare) and isinstance(
            node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn
        ):
            for side in node.comparators:
                # By itself what something is in is a table, not a class.
                if isinstance(node.ops[0], ast.Is | ast.IsNot) or not isinstance(side, ast.Name):
                    yield from names(side)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                rows = value.args if isinstance(value, ast.Call) else [value]
                for part in (*filter(None, [key]), *rows):
                    yield from names(part)


def _class_of(sources: Sources, dotted: str) -> str:
    definition = sources.locate(dotted)
    return f"{definition.module}:{definition.qualname.partition('.')[0]}"


def _with_bases(sources: Sources, dotted: str) -> Iterator[str]:
    definition = sources.locate(dotted)
    yield f"{definition.module}:{definition.qualname}"
    for base in definition.node.bases if isinstance(definition.node, ast.ClassDef) else ():
        with suppress(SourceNotFoundError):  # of another package
            if isinstance(base, ast.Name):
                yield from _with_bases(sources, f"{definition.module}:{base.id}")


NOT_REPEATED = {
    "of tensor parallelism, where vLLM's modules run": (
        "tensor_model_parallel_all_gather tensor_model_parallel_all_reduce"
        " split_tensor_along_last_dim get_masked_input_and_mask LogitsProcessor._gather_logits"
        " get_tensor_model_parallel_world_size get_pp_group"
    ),
    "other kernels, another device's or another number format's": (
        "causal_conv1d_weight_pack weight_packed_linear_cpu check_cpu_sgl_kernel is_fp8"
        " linear_batch_invariant zentorch_sdpa_attn vocab_parallel_embedding"
        " mixed_sample_eligible _aiter_raw_fused_sample _FUSED_ACT_QUANT _FUSED_ACT_QUANT_SUPPORT"
    ),
    "makes the modules, which are vLLM's own": (
        "support_torch_compile CustomOp.register CustomOp.__init__ RMSNorm VocabParallelEmbedding"
        " MergedColumnParallelLinear QKVParallelLinear RowParallelLinear get_rope"
        " extract_layer_index set_default_rope_theta LlamaForCausalLM._init_model ParallelLMHead"
        " LogitsProcessor PPMissingLayer maybe_prefix make_layers spec_decode_needs_target_embed"
        " make_empty_intermediate_tensors_factory"
    ),
    "called by us as well": (
        "LogprobsTensors SamplerOutput batched_count_greater_than apply_bad_words"
        " Sampler._combine_outputs_with_spec_tokens Sampler.apply_penalties"
        " Sampler.compute_logprobs Sampler.gather_logprobs Sampler.greedy_sample"
        " apply_top_k_top_p get_forward_context RotaryEmbeddingBase._match_cos_sin_cache_dtype"
    ),
    "verification that ours takes the place of": (
        "apply_bad_words_with_drafts apply_all_penalties _expand _rejection_greedy_sample"
        " _rejection_random_sample _sample_recovered_tokens apply_sampling_constraints"
        " rejection_sample unconditional_to_conditional_rates"
    ),
    "of a class that must have its own": "CustomOp.forward_native",
    "of use_fp64_gumbel, where vLLM's own sampler draws": (
        "empty_exponential_noise_like sample_with_exponential_noise"
    ),
    "moves or holds data and computes nothing": (
        "current_platform logger IntermediateTensors _encode_layer_name async_tensor_h2d"
        " process_dict_updates register_op _FLASHINFER_BF16_BACKENDS _resolve_layer_name"
        " GPUModelRunner._get_cumsum_and_arange lazy tensors_str_no_data"
    ),
}
"""vLLM's functions that a repeated body calls and that are no part of what is repeated: why."""


@pytest.mark.parametrize(
    "record",
    [*cpu_layers.PATCHES, *cpu_target.PATCHES, v1_verifier.PATCH, v1_draft_metadata.PATCH],
    ids=lambda record: record.qualname,
)
def test_what_a_repeated_body_calls_is_fingerprinted_too(record: Any) -> None:
    """A body that only delegates is repeated with what it calls."""
    sources, allowed = Sources(), {n for names in NOT_REPEATED.values() for n in names.split()}
    bodies = [sources.locate(name) for name in record.fingerprints]
    named = {f"{body.module}:{body.qualname}" for body in bodies}
    missing = set()
    for body in bodies:
        for called in _called(sources, body):
            full = f"{called.module}:{called.qualname}"
            is_named = any(full == name or full.startswith(f"{name}.") for name in named)
            if called.qualname and not is_named and called.qualname not in allowed:
                missing.add(f"{full}, by {body.qualname}")
    assert not missing


CONSTANTS = {
    "vllm.v1.sample.rejection_sampler:MAX_SPEC_LEN": "what vLLM's own refuses; nothing is sized",
    "vllm.v1.sample.rejection_sampler:PLACEHOLDER_TOKEN_ID": "imported",
    "vllm.config.model:PROCESSED_LOGPROBS_MODES": "of modes' names, which users give",
    "vllm.ir.op:_ENABLE_TORCH_WRAP": "of compiled code",
}
"""vLLM's numbers and names that a repeated body reads: how ours follow them."""


def test_a_constant_that_a_repeated_body_reads_is_not_copied() -> None:
    """Below which temperature a request is greedy was a number of ours: with another in vLLM the
    text was another than without a drafter, and nothing was said."""
    sources, found = Sources(), set()
    for record in (*cpu_layers.PATCHES, *cpu_target.PATCHES, v1_verifier.PATCH):
        for body in map(sources.locate, record.fingerprints):
            for name in {n.id for n in ast.walk(body.node) if isinstance(n, ast.Name)}:
                with suppress(SourceNotFoundError):
                    constant = sources.find(f"{body.module}:{name}")
                    value = getattr(constant.node, "value", None)
                    if isinstance(value, ast.Constant | ast.Tuple | ast.UnaryOp):
                        known = f"{constant.module}:{constant.qualname}"
                        found |= {known} - set(record.names)
    assert found == CONSTANTS.keys()


def _called(sources: Sources, body: Definition) -> Iterator[Definition]:
    """vLLM's functions that a definition calls by name, or by a method's name of its own class."""
    for call in ast.walk(body.node):
        if not isinstance(call, ast.Call):
            continue
        parts = ast.unparse(call.func).split(".")
        names = [f"{body.module}:{'.'.join(parts)}", f"{body.module}:{parts[0]}"]
        if parts[0] in ("self", "super()"):
            own = f"{body.module}:{body.qualname.split('.')[0]}"
            classes = [own]
            with suppress(SourceNotFoundError):
                classes = list(_with_bases(sources, own))[parts[0] == "super()" :]
            names = [".".join([each, *parts[1:]]) for each in classes]
        for name in names:
            with suppress(SourceNotFoundError):
                found = sources.find(name)
                if isinstance(found.node, ast.Module) and len(parts) > 1:
                    found = sources.find(f"{found.module}:{parts[1]}")
                if found.module.startswith("vllm") and not isinstance(
                    found.node, ast.Module | ast.Import
                ):
                    yield found
                break

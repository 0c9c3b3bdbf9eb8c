"""Every key that a config of this family may have: honoured, refused by name, or reviewed as of no
effect; and its type.

What passes here has to start: transformers and vLLM read the same file later, and refuse without a
remedy.

    pytest tests/unit/test_config_keys.py
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from broken import REMEDY, refusal, refused_or_read
from pairs import make_random_drafter, random_drafter_config
from published import QWEN3_8B
from unit.test_checks import configure
from vllm_dflash import kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import write
from vllm_dflash.formats.keys import (
    LENGTHS,
    NO_EFFECT,
    OF_TRANSFORMERS,
    OF_VLLM,
    READ,
    READ_ELSEWHERE,
    REFUSED,
)
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.tools.repair import config_problems

# Per key a value that is not its default. Of no effect are those of ``NO_EFFECT``, each reviewed
# there.
OTHER_VALUES: dict[str, Any] = {
    "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    "is_neox_style": False,
    "rope_interleaved": True,
    "mlp_bias": True,
    "qk_norm": False,
    "clip_qkv": 8.0,
    "attention_multiplier": 0.01,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "attention_sink_bias": True,
    "add_swa_attention_sink_bias": True,
    "attention_value_scale": 0.7,
    "hidden_activation": "gelu",
    "num_experts": 8,
    "kv_lora_rank": 512,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8192,
    "scale_emb": 12,
    "attention_sinks": True,
    "use_sink": True,
    "num_sink_tokens": 4,
    "sinks": [1.0],
    "text_config": {},
    "text_encoder": {"a": 1},
    "decoder": {},
    "generator": {},
    "llm_config": {},
    "sub_configs": {},
    "attribute_map": {"a": "b"},
    "to_dict": None,
    "get_text_config": 1,
    "__class__": "x",
    "per_layer_config": {"0": {}},
    "mtp_layer_types": 3,
    "compression_config": {"quant_method": "fp8"},
    "num_kv_heads": 1,
    "target_hidden_size": 2048,
    "norm_before_fc": True,
    "logit_scale": -1.0,
    "final_logit_softcapping": -30.0,
    "projector_type": "domino",
    "shift_label": True,
    "model_type": "gemma3_text",
    "dual_chunk_attention_config": {"chunk_size": 8},
    "sliding_window": "8",
    "max_window_layers": "1",
    "is_causal": True,
    "model": None,
    "n_predict": 3,
    "seq_length": 64,
    "hc_mult": 2,
    "moe_num_experts": 8,
    "rotary_emb_base": 1e4,
}
IN_DFLASH_CONFIG: dict[str, Any] = {
    "shift_label": True,
    "projector_type": "dspark",
    "sample_from_anchor": True,
    "use_aux_hidden_state": False,
    "attention_value_scale": 0.7,
    "attention_sink_bias": True,
    "add_swa_attention_sink_bias": True,
    "conv_kernel_size": 2,
    "selector_rank": 256,
    "markov_rank": 8,
    "thresh_head_direct_len": 3,
    "final_logit_softcapping": -1,
    "anything_new": 1,
    "causal": True,
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_key_that_changes_what_is_computed(name: str) -> None:
    """rope_parameters.partial_rotary_factor was served as if it were not there, tau unchanged by
    luck."""
    error = refusal(QWEN3_8B | {name: OTHER_VALUES[name]})
    parts = error.field.split(".")
    assert (
        name in parts
        or {name, parts[0]} <= {"rope_scaling", "rope_parameters"}
        or name == "is_causal"
    ), error
    assert [str(error)] == [
        str(problem) for problem in config_problems(QWEN3_8B | {name: OTHER_VALUES[name]})
    ]


@pytest.mark.parametrize("name", sorted(kinds.setting_names()))
def test_a_setting_of_a_head_that_it_has_not(name: str) -> None:
    """By the heads' own records: a new head's is refused with no line beside its record."""
    assert refusal(QWEN3_8B | {name: 3}).field == name
    nested = QWEN3_8B["dflash_config"] | {name: 3}
    assert refusal(QWEN3_8B | {"dflash_config": nested}).field == f"dflash_config.{name}"
    for none in (0, False, None):
        assert config_problems(QWEN3_8B | {name: none}) == []


def test_a_heads_setting_by_the_name_of_everyones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's head may call its own as it likes; other drafters are judged as before."""
    judged = {"n_predict": 0, "model": False, "max_seq_len": 0}
    names = frozenset({"hidden_size", "tie_word_embeddings", "mine", *judged})
    for of_heads in ("setting_names", "said_names"):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, of_heads, lambda: names)
            assert config_problems(QWEN3_8B) == []
            assert config_problems(QWEN3_8B | {"max_seq_len": 40960}) == []
            assert refusal(QWEN3_8B | {"mine": 3}).field == "mine"
            for name, value in judged.items():
                assert refusal(QWEN3_8B | {name: value}).field == name


@pytest.mark.parametrize("kind", ["lilicorr", "dflash2"])
def test_a_heads_setting_in_two_places(kind: str) -> None:
    """Alike it is read; two values are refused by name."""
    config = random_drafter_config(kind=kind).with_()
    raw = write(config, config.format)
    for name in kinds.every()[kind].head.settings:
        value = raw["dflash_config"][name]
        assert config_problems(raw | {name: value}) == []
        assert refusal(raw | {name: 2 * value}).field == name


@pytest.mark.parametrize(
    "given", [{"partial_rotary_factor": 0.25}, {"mrope_section": [24, 20, 20]}], ids=str
)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_parameters_of_another_rotation_in_each_format(place: str, given: dict[str, Any]) -> None:
    """Beside ``rope_type: default`` they were dropped."""
    (name,) = given
    rope = {place: {"rope_type": "default", "rope_theta": QWEN3_8B["rope_theta"]} | given}
    raw = write(DrafterConfig.from_dict(QWEN3_8B), "speculators")
    layers = raw["transformer_layer_config"] | rope
    for changed in (QWEN3_8B | rope, raw | {"transformer_layer_config": layers}):
        assert refusal(changed).field == f"{place}.{name}"
    assert refusal(raw | {"shift_label": True}).field == "shift_label"


@pytest.mark.parametrize("name", IN_DFLASH_CONFIG)
def test_a_key_of_dflash_config(name: str) -> None:
    """``shift_label: true`` drafted one position off."""
    raw = QWEN3_8B | {"dflash_config": QWEN3_8B["dflash_config"] | {name: IN_DFLASH_CONFIG[name]}}
    assert refusal(raw).field == f"dflash_config.{name}"


def test_every_key_of_transformers_is_in_one_place() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    every = {
        name
        for kind in (Qwen3Config, Qwen2Config, LlamaConfig, MistralConfig)
        for name in kind().to_dict()
    }
    for name in sorted(every):
        if name in READ:
            continue
        changed = QWEN3_8B | {name: OTHER_VALUES.get(name, "not a value of any key \x00")}
        try:
            config = DrafterConfig.from_dict(changed)
        except DrafterConfigError as error:
            assert error.field == name, error  # noqa: PT017 (refusing it is one way of three)
        else:
            assert name not in config.unknown_keys, f"{name}: read it, refuse it or review it"
    assert not READ & NO_EFFECT.keys()


def test_names_of_transformers_own_attributes() -> None:
    """``to_dict: 1`` was an unknown key for inspect, and ended vLLM's start with "int object is not
    callable"."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = (Qwen3Config, Qwen2Config, LlamaConfig, MistralConfig)
    theirs = {name for kind in kinds for name in dir(kind) if not name.startswith("__")}
    judged = READ | NO_EFFECT.keys() | REFUSED.keys()
    assert theirs - judged <= OF_TRANSFORMERS
    assert not OF_TRANSFORMERS & (judged | READ_ELSEWHERE)
    # The server may judge what such a class gives back.
    assert not OF_TRANSFORMERS & {name for kind in kinds for name in kind().to_dict()}
    for name in sorted(OF_TRANSFORMERS):
        for value in (None, {}, 1):
            assert refusal(QWEN3_8B | {name: value}).field == name


def test_names_that_get_text_config_looks_for() -> None:
    import inspect

    from transformers import PretrainedConfig

    source = inspect.getsource(PretrainedConfig.get_text_config)
    line = {"decoder", "generator", "text_config", "text_encoder"}
    assert line <= READ_ELSEWHERE
    assert all(f'"{name}"' in source for name in line)
    assert source.count("_possible_text_config_names = (") == 2, "read it anew"


def test_names_that_vllm_reads_a_length_by() -> None:
    """vLLM drafts to the shortest: a file with ``seq_length: 64`` was sound, and drafts ended
    there."""
    import ast

    from vllm_dflash.upstream import Sources

    convertor = "vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase"
    (theirs,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(Sources().locate(f"{convertor}.derive_max_model_len_and_key").node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    )
    assert set(theirs) == LENGTHS | {"max_position_embeddings"}
    reach = QWEN3_8B["max_position_embeddings"]
    for name in sorted(LENGTHS):
        for value in (None, reach, 2 * reach, int(1e30)):
            assert DrafterConfig.from_dict(QWEN3_8B | {name: value}).unknown_keys == ()
        for value in ("x", "", 0, -1, True, False, -0.0, 5e-324, 1.5, 64, [8], {}, 10**400):
            assert refusal(QWEN3_8B | {name: value}).field == name


_READERS = (
    "vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
    "vllm.config.speculative:SpeculativeConfig.__post_init__",
    "vllm.config.model:_get_head_dtype",
    "vllm.config.model:_get_and_verify_max_len",
    "vllm.transformers_utils.config:patch_rope_parameters",
)
_NOT_OF_OURS = {
    # Of other methods, model types or runners, or set by ``check_speculative_config``
    "block_size",
    "draft_vocab_size",
    "dspark_block_size",
    "dspark_draft_topk",
    "dspark_target_layer_ids",
    "num_nextn_predict_layers",
    "target_layer_ids",
    # Of a longrope's own parameters, and of attributes of vLLM's and transformers' objects
    "original_max_position_embeddings",
    "block_type",
    "hf_config",
    "revision",
}


def test_every_key_that_vllms_config_readers_ask_a_draft_config_for() -> None:
    """Seven of them passed inspect and doctor, and ended the start in a TypeError,
    ZeroDivisionError or AttributeError."""
    import ast

    from vllm_dflash.upstream import Sources

    asked: set[str] = set()
    for node in (n for reader in _READERS for n in ast.walk(Sources().locate(reader).node)):
        match node:
            case ast.Call(
                func=ast.Name("getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                asked.add(name)
            case ast.Assign(targets=[ast.Name()], value=ast.List(elts=names)):
                asked |= {each.value for each in names if isinstance(each, ast.Constant)}
    assert asked >= {"n_predict", "rswa_window", "head_dtype", "moe_num_experts", "seq_len"}
    elsewhere = READ_ELSEWHERE | OF_TRANSFORMERS | OF_VLLM
    judged = READ | REFUSED.keys() | NO_EFFECT.keys() | LENGTHS | elsewhere
    assert asked - judged - _NOT_OF_OURS == set()


@pytest.mark.parametrize("value", [None, False, 0])
def test_no_sinks(value: Any) -> None:
    config = DrafterConfig.from_dict(QWEN3_8B | {"attention_sinks": value})
    assert config.unknown_keys == ()


@pytest.mark.parametrize(
    ("name", "values", "nested"),
    [
        ("block_size", (16, 8), {"block_size": 8}),
        ("mask_token_id", (151669, 5), {}),
        ("is_causal", (False, True), {"causal": False}),
        ("dtype", ("bfloat16", "float16"), {}),
    ],
)
def test_a_setting_in_two_places(name: str, values: Any, nested: dict[str, Any]) -> None:
    """``block_size: 16`` won in silence over ``dflash_config.block_size: 8``."""
    inner = QWEN3_8B["dflash_config"] | nested
    raw = QWEN3_8B | {"dflash_config": inner, "torch_dtype": "bfloat16"}
    same = inner.get("causal" if name == "is_causal" else name, values[0])
    assert DrafterConfig.from_dict(raw | {name: same})
    other = next(value for value in values if value != same)
    if name == "is_causal":
        sliding = ["sliding_attention"] * QWEN3_8B["num_hidden_layers"]
        raw |= {"layer_types": sliding, "sliding_window": 64, "use_sliding_window": True}
    error = refusal(raw | {name: other})
    assert error.field == name
    beside = {"dtype": "torch_dtype", "is_causal": "dflash_config.causal"}
    assert beside.get(name, f"dflash_config.{name}") in error.problem


@pytest.mark.parametrize("name", [*sorted(READ), "speculators_model_type", "new_trick"])
@pytest.mark.parametrize("value", [[{}], [[]], [[{}]], {"a": {}}, {"a": [[]]}, {}, []])
def test_values_that_cannot_be_a_key(name: str, value: Any) -> None:
    """``architectures: [{}]`` ended inspect and vLLM's start in a bare TypeError: unhashable
    type."""
    from vllm_dflash.formats import is_foreign

    raw = QWEN3_8B | {name: value}
    assert is_foreign(raw) in (True, False)
    error = refused_or_read(raw)
    assert error is None or error.remedy
    assert all(config_problems(raw)) or error is None


@pytest.mark.parametrize("value", [None, [], [{}], [[]], {"a": 1}, "x", ["A", "B"]])
def test_unjudged_architectures_are_not_ours(value: Any) -> None:
    from types import SimpleNamespace

    from vllm_dflash.formats import is_ours

    draft = SimpleNamespace(architectures=value)
    assert not is_ours(SimpleNamespace(method="dflash", draft_model_config=draft))


def test_unknown_keys_are_told() -> None:
    assert DrafterConfig.from_dict(QWEN3_8B | {"new_trick": 3, "a": None}).unknown_keys == (
        "a",
        "new_trick",
    )
    assert DrafterConfig.from_dict(QWEN3_8B).unknown_keys == ()


def test_inspect_tells_unknown_keys(tmp_path: Path) -> None:
    import json

    folder = make_random_drafter(tmp_path / "d")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_trick": 3}))
    found = inspect_checkpoint(folder)
    assert (found.problems, len(found.warnings)) == ([], 1)
    assert "not known here: new_trick" in found.warnings[0]


_VALUES: list[Any] = [
    None,
    "x",
    [1],
    {"a": 1},
    -1,
    10**400,
    1e308,
    True,
    math.nan,
    math.inf,
    0,
    1.5,
]
_KEYS = sorted(
    (READ | NO_EFFECT.keys())
    - {"speculators_model_type", "transformer_layer_config", "architectures", "method"}
)


@pytest.mark.parametrize("name", _KEYS)
def test_what_passes_is_read_by_transformers(name: str) -> None:
    """49 such files were sound by ``inspect`` and refused by vLLM's start, three of them with a
    bare TypeError or OverflowError."""
    from transformers import Qwen3Config

    config = random_drafter_config()
    for value in _VALUES:
        raw = copy.deepcopy(write(config, "z-lab")) | {name: value}
        error = refused_or_read(raw)
        if error is not None:
            assert all((error.field, error.problem, error.remedy)), error
            assert name in error.field or name in error.problem, error
            assert REMEDY.search(str(error)), error
            continue
        Qwen3Config.from_dict(copy.deepcopy(raw))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", None),
        ("sliding_window", "8"),
        ("quantization_config", {"quant_method": "x"}),
        ("rope_theta", 10**400),
        ("auto_map", 1),
        ("id2label", {"a": 1}),
        ("model_type", "dflash"),
        ("initializer_range", "x"),
        ("architectures", None),
        ("architectures", ["DFlashDraftModel", "Other"]),
        ("dflash_config", [1]),
        ("hidden_act", None),
        ("partial_rotary_factor", 0.5),
        ("architectures", [{}]),
        ("text_config", {"hidden_size": 8}),
        ("to_dict", 1),
        ("attention_sinks", True),
        ("num_kv_heads", 1),
        ("torch_dtype", "float16"),
        ("model", "x"),
        ("model", None),
        ("num_kv_heads", None),
        ("n_predict", 0),
        ("n_predict", "x"),
        ("max_sequence_length", [8]),
        ("max_seq_len", False),
        ("seq_length", 64),
        ("n_positions", {}),
        ("model_max_length", 0),
        ("rswa_window", "x"),
    ],
)
def test_inspect_doctor_and_start_say_the_same(
    random_target: Path, tmp_path: Path, name: str, value: Any
) -> None:
    import json

    from vllm_dflash.tools.pair_checks import checkpoint_checks

    folder = make_random_drafter(tmp_path / "d")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    found = inspect_checkpoint(folder)
    assert len(found.errors) == 1, found.problems
    assert name in (found.errors[0].field.partition(".")[0], f"torch_{found.errors[0].field}")
    (check,) = checkpoint_checks(found)
    assert (check.state, check.remedy) == ("error", found.errors[0].remedy)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared)
        configure(random_target, folder)
    assert found.problems[0] in str(error.value)

"""Broken configs, generated: each is refused with a DrafterConfigError that names the field and a
remedy.

For every format each field is left out, given every wrong type and values out of range. Nothing
else than a
DrafterConfigError may come out: a KeyError or a TypeError from the depth of a loader tells a user
nothing.

    pytest tests/unit/test_broken_configs.py
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broken import REMEDY, refused
from pairs import random_drafter_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import write

MISSING = "(missing)"
_WRONG_TYPES: list[Any] = [
    "x",
    "",
    1.5,
    [1],
    [],
    [None],
    {"a": 1},
    {},
    [{}],
    [[]],
    {"a": {}},
    True,
    False,
    math.nan,
    math.inf,
    -1,
    0,
    10**18,
]


def _template(format: str) -> dict[str, Any]:
    """A config.json with every optional field in use."""
    config = random_drafter_config(
        sliding_windows=(24, None, 24),
        draft_vocab_size=200,
        quantization_config={"quant_method": "fp8"},
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    )
    if format == "AngelSlim":
        config = config.with_(kind="dflare")
    return write(config, format, verifier="target")


# Per field, the values that are legal there, written by hand. Everything else of the lists above
# has to be refused.
_OPTIONAL = [None, MISSING]
_FLAG = [*_OPTIONAL, True, False]
_LEGAL_EVERYWHERE: dict[str, list[Any]] = {
    "hidden_size": [],
    "intermediate_size": [],
    "num_hidden_layers": [],
    "num_attention_heads": [],
    "num_key_value_heads": [],
    "vocab_size": [],
    "max_position_embeddings": [],
    "block_size": [],
    "head_dim": _OPTIONAL,
    "rms_norm_eps": _OPTIONAL,
    "attention_bias": _FLAG,
    "rope_theta": [*_OPTIONAL, 1.5, 10**18],
    "rope_scaling": [*_OPTIONAL, {}],
    "rope_scaling.rope_type": [],
    "rope_scaling.factor": [1.5, 10**18],
    "rope_scaling.original_max_position_embeddings": [],
    "hidden_act": [MISSING],
    "layer_types": _OPTIONAL,
    "use_sliding_window": [*_OPTIONAL, True],
    "sliding_window": [],
}
_LEGAL_OUTSIDE: dict[str, list[Any]] = {
    "draft_vocab_size": _OPTIONAL,
    "num_target_layers": _OPTIONAL,
    "dtype": _OPTIONAL,
    "quantization_config": _OPTIONAL,
    "quantization_config.quant_method": [],
}
_PLAIN = (
    _LEGAL_EVERYWHERE
    | _LEGAL_OUTSIDE
    | {
        "architectures": [],
        "dflash_config": [],
        "dflash_config.mask_token_id": [0],
        "dflash_config.target_layer_ids": [[1]],
        "dflash_config.causal": [None, MISSING, False],
        # transformers reads these two formats at vLLM's start, and takes null for none of these.
        "head_dim": [MISSING],
        "rms_norm_eps": [MISSING],
        "attention_bias": [MISSING, True, False],
        "use_sliding_window": [MISSING, True],
    }
)
LEGAL: dict[str, dict[str, list[Any]]] = {
    "z-lab": _PLAIN,
    "AngelSlim": _PLAIN,
    "speculators": (
        {
            f"transformer_layer_config.{name}": values
            for name, values in _LEGAL_EVERYWHERE.items()
            if name != "block_size"
        }
        | _LEGAL_OUTSIDE
        | {
            "speculators_model_type": [],
            "transformer_layer_config": [],
            "mask_token_id": [0],
            "aux_hidden_state_layer_ids": [[1]],
            "sample_from_anchor": [*_OPTIONAL, False, 0],
            "sliding_window_non_causal": [True, False],
            "block_size": [],
        }
    ),
}


def _is_legal(value: Any, legal: list[Any]) -> bool:
    # By type too: True equals 1, and 0 equals False.
    return any(type(value) is type(v) and value == v for v in legal)


def _broken_configs() -> Iterator[Any]:
    for format, fields in LEGAL.items():
        for path, legal in fields.items():
            values = [v for v in [MISSING, None, *_WRONG_TYPES] if not _is_legal(v, legal)]
            yield pytest.param(format, path, values, legal, id=f"{format} {path}")


def _changed(format: str, path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(_template(format))
    *parents, name = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    if value is MISSING:
        place.pop(name, None)
    else:
        place[name] = value
    return raw


@pytest.mark.parametrize("format", LEGAL)
def test_the_templates_are_sound(format: str) -> None:
    """What is broken below was whole before."""
    assert DrafterConfig.from_dict(_template(format)).draft_vocab_size == 200


@pytest.mark.parametrize(("format", "path", "values", "legal"), _broken_configs())
def test_a_broken_field(format: str, path: str, values: list[Any], legal: list[Any]) -> None:
    """``dtype = []`` was once read as bfloat16, ``rms_norm_eps = Infinity`` as it stands, a missing
    yarn factor ended in vLLM's KeyError."""
    assert len(values) >= 10, "a field with so many legal values is not tested"
    for value in values:
        with pytest.raises(DrafterConfigError) as error:
            DrafterConfig.from_dict(_changed(format, path, value))
        message = str(error.value)
        names = {path.rpartition(".")[2], *_SHOWN_BY.get(path, ())}
        assert any(name in message for name in names), f"{value!r}: {message}"
        assert REMEDY.search(message), f"{value!r}: {message}"
    for value in legal:
        DrafterConfig.from_dict(_changed(format, path, value))


# Without these, another field's message says what the file is not.
_SHOWN_BY = {
    "speculators_model_type": ["architectures"],
    "transformer_layer_config": ["num_hidden_layers"],
    "dflash_config": ["num_target_layers"],
}


_POSITIONS = {"original_max_position_embeddings": 128}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 16,
    "long_factor": [1.0] * 16,
    **_POSITIONS,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **_POSITIONS,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, **_POSITIONS}


@pytest.mark.parametrize("scaling", [_LONGROPE, _LLAMA3, _YARN])
def test_scalings_that_fit(scaling: dict[str, Any]) -> None:
    """What the cases below break was whole before."""
    config = DrafterConfig.from_dict(_changed("z-lab", "rope_scaling", scaling))
    assert (config.head_dim, config.rope_scaling) == (32, scaling)


@pytest.mark.parametrize("format", LEGAL)
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_size", 1, "block_size is 1"),
        ("block_size", 64, "sliding_window is 24, less than a block of 64"),
        ("mask_token_id", 512, "mask_token_id 512"),
        ("mask_token_id", -1, "mask_token_id is -1"),
        ("layer_ids", [2, 3, 2], "names a layer twice"),
        ("layer_ids", [1, 2, 6], "are outside the target's 5 layers"),
        ("layer_ids", [1, True], "True"),
        ("layer_ids", "1,2,3", "1,2,3"),
        ("draft_vocab_size", 513, "draft_vocab_size 513"),
        ("head_dim", 31, "head_dim is 31"),
        ("num_key_value_heads", 3, "num_key_value_heads 3"),
        ("layer_types", ["full_attention"], "layer_types"),
        ("layer_types", ["full_attention", "chunked", None], "chunked"),
        ("sliding_window", 7, "sliding_window is 7"),
        ("rope_scaling", {"factor": 2.0}, "no rope_type"),
        ("rope_scaling", {"rope_type": "mrope"}, "mrope"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (
            "rope_scaling",
            {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": 1.0},
            "short_factor",
        ),
        *(
            ("rope_scaling", {**_LONGROPE, name: factors}, f"{name} has length {len(factors)}")
            for name in ("short_factor", "long_factor")
            for factors in ([1.0], [1.0] * 15, [1.0] * 32)
        ),
        ("rope_scaling", {**_LLAMA3, "low_freq_factor": 8.0}, "low_freq_factor is 8.0"),
        ("rope_scaling", {**_LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is 4.0"),
        ("rope_scaling", {**_YARN, "beta_slow": 64}, "beta_slow is 64"),
        ("rope_scaling", {**_YARN, "beta_fast": 0.5}, "which is 0.5"),
        ("rope_scaling", {**_YARN, "attention_factor": True}, "attention_factor is True"),
        ("rope_scaling", {**_YARN, "truncate": 1}, "truncate is 1"),
        ("rope_scaling", {"rope_type": {}}, "rope_scaling.rope_type is {}"),
        ("rope_scaling", {"type": {"a": 1}}, "rope_scaling.rope_type is {'a': 1}"),
        ("rope_scaling", {**_YARN, "factor": {}}, "rope_scaling.factor is {}"),
        ("rope_scaling", {**_YARN, "type": "linear"}, "type beside it is 'linear'"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope_parameters.factor is 2.0"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("rms_norm_eps", 2.0, "rms_norm_eps"),
    ],
)
def test_a_value_out_of_range(format: str, field: str, value: Any, words: str) -> None:
    spelled = (
        {"layer_ids": "aux_hidden_state_layer_ids"}
        if format == "speculators"
        else {
            "layer_ids": "dflash_config.target_layer_ids",
            "mask_token_id": "dflash_config.mask_token_id",
        }
    )
    path = spelled.get(field, field)
    if format == "speculators" and (
        path == "rope_parameters" or (path in _LEGAL_EVERYWHERE and path != "block_size")
    ):
        path = f"transformer_layer_config.{path}"
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(_changed(format, path, value))
    assert words in str(error.value)
    assert REMEDY.search(str(error.value)), error.value
    if field == "layer_ids":
        assert path.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize("value", [None, [1], "x", 3, True])
def test_a_config_of_another_type(value: Any) -> None:
    """``null`` was said to hold NoneType."""
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(value)
    words = {None: "null", "x": "a text", 3: "a number"}
    said = "a list" if value == [1] else "true or false" if value is True else words[value]
    assert f"it holds {said}, not an object" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"3",
        b'"dflash"',
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["empty", "list", "null", "number", "string", "cut", "no UTF-8", "nested", "LFS pointer"],
)
def test_a_config_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, "config.json")

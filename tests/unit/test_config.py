"""Drafter configurations: the published one parses and writes itself back; each bad one is refused
with a remedy.

Tests: ``pytest tests/unit/test_config.py``.
"""

import copy
import json
from typing import Any

import pytest

from published import QWEN3_8B
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import write
from vllm_dflash.pairing import TargetShape, check_pair, default_target_layer_ids


def changed(path: str, value: Any) -> dict[str, Any]:
    """A copy of the published configuration with the field at the dotted ``path`` set, or removed
    where None."""
    raw = copy.deepcopy(QWEN3_8B)
    *parents, name = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    if value is None:
        place.pop(name)
    else:
        place[name] = value
    return raw


def test_published_config() -> None:
    config = DrafterConfig.from_dict(QWEN3_8B)
    assert (config.block_size, config.max_speculative_tokens, config.num_features) == (16, 15, 5)
    assert (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_target_layers,
    ) == (4096, 12288, 5, 36)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.mask_token_id, config.target_layer_ids) == (151669, (1, 9, 17, 25, 33))
    assert (config.vocab_size, config.rope_theta, config.max_position_embeddings) == (
        151936,
        1e6,
        40960,
    )


def test_round_trip() -> None:
    config = DrafterConfig.from_dict(QWEN3_8B)
    written = json.loads(json.dumps(write(config, "z-lab")))
    assert DrafterConfig.from_dict(written) == config
    assert {name: written[name] for name in QWEN3_8B} == QWEN3_8B


def test_target_layer_ids_follow_the_published_rule() -> None:
    assert default_target_layer_ids(5, 36) == (1, 9, 17, 25, 33)
    assert default_target_layer_ids(3, 8) == (1, 3, 5)
    assert default_target_layer_ids(1, 8) == (4,)
    with pytest.raises(DrafterConfigError, match="give target_layer_ids"):
        default_target_layer_ids(2, 3)


def test_target_layers_are_not_guessed() -> None:
    """The rule was applied in silence, and ``inspect`` called the file sound; vLLM's own dflash
    takes other layers for it."""
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(changed("dflash_config.target_layer_ids", None))
    assert error.value.field == "dflash_config.target_layer_ids"
    assert "target_layer_ids is missing: give a list of zero-based target layers" in str(
        error.value
    )
    assert "they are [1, 9, 17, 25, 33]: write them in, and vllm-dflash doctor says" in str(
        error.value
    )
    raw = changed("dflash_config.target_layer_ids", None)
    del raw["num_target_layers"]
    with pytest.raises(
        DrafterConfigError,
        match=r"target_layer_ids is missing: give a list of zero-based target layers\. Use",
    ):
        DrafterConfig.from_dict(raw)


def test_an_error_has_parts() -> None:
    """Others took the message apart by its colons, so a value with a colon moved into the
    remedy."""
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(changed("hidden_act", "a: b"))
    at = error.value.at("folder/config.json")
    assert (at.field, at.problem, at.where) == (
        "hidden_act",
        "hidden_act is 'a: b'",
        "folder/config.json",
    )
    assert at.remedy == "only silu is supported; use another checkpoint"
    assert str(at) == f"{at.where}: {at.problem}: {at.remedy}"


def test_a_message_is_printable() -> None:
    """Names of tensors and texts of a config reach a terminal: colours, bells and turned text were
    acted on there."""
    error = DrafterConfigError("unexpected: a\x1b[31m\x07\u202eb\nc \ud83d \u00fc", where="d\x9b2J")
    assert str(error) == "d\\x9b2J: unexpected: a\\x1b[31m\\x07\\u202eb\\nc \\ud83d \u00fc"
    assert len(str(DrafterConfigError("x" * 10**6))) < 3000


@pytest.mark.parametrize(
    ("rows", "tokens", "fits"),
    [
        (151936, None, True),
        (152448, 151936, True),
        (152448, 151000, True),
        (152448, 151937, False),
        (152448, None, False),
        (151000, 150000, False),
    ],
)
def test_a_padded_vocabulary(rows: int, tokens: int | None, fits: bool) -> None:
    """A target whose embedding is longer than its tokenizer was called another target (vLLM
    46435)."""
    config, target = DrafterConfig.from_dict(QWEN3_8B), TargetShape(4096, 36, rows, tokens)
    if fits:
        check_pair(config, target, 15, 40960)
    else:
        with pytest.raises(
            DrafterConfigError, match=f"vocab_size is {rows}, the drafter's is 151936"
        ):
            check_pair(config, target, 15, 40960)


def test_newer_names_of_the_same_fields() -> None:
    """transformers 5 writes the rotary base into ``rope_parameters``; older files say
    ``torch_dtype``."""
    raw = changed("rope_theta", None) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
    }
    raw.pop("dtype")
    config = DrafterConfig.from_dict(raw | {"torch_dtype": "float16"})
    assert (config.rope_theta, config.dtype) == (5e5, "float16")


@pytest.mark.parametrize(
    ("path", "value", "names", "remedy"),
    [
        ("architectures", ["Qwen3ForCausalLM"], "architectures", "Point 'model'"),
        ("architectures", None, "architectures", "Point 'model'"),
        ("hidden_size", None, "hidden_size is missing", "came with"),
        ("hidden_size", "4096", "hidden_size", "positive whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0", "positive whole number"),
        ("block_size", True, "block_size", "positive whole number"),
        ("block_size", 1, "block_size is 1", "at least 2"),
        ("dflash_config", None, "dflash_config is missing", "came with"),
        ("dflash_config.mask_token_id", None, "mask_token_id", "trained with"),
        ("dflash_config.mask_token_id", 151936, "151936", "trained with"),
        ("dflash_config.target_layer_ids", [], "target_layer_ids", "zero-based"),
        ("dflash_config.target_layer_ids", [1, "9"], "target_layer_ids", "zero-based"),
        ("dflash_config.target_layer_ids", [1, 36], "[36]", "one-based"),
        ("dflash_config.target_layer_ids", [1, 1], "twice", "once"),
        ("num_key_value_heads", 7, "num_key_value_heads 7", "fix config.json"),
        ("rope_scaling", {"rope_type": "spiral"}, "spiral", "another checkpoint"),
        ("rope_scaling", "yarn", "rope_scaling", "give an object"),
        ("layer_types", ["sliding_attention"] * 5, "sliding_window is missing", "came with"),
        ("layer_types", ["full_attention"] * 4, "layer_types", "one a layer"),
        ("layer_types", ["chunked_attention"] * 5, "chunked_attention", "another checkpoint"),
        ("attention_bias", "yes", "attention_bias", "true or false"),
        ("hidden_act", "gelu", "hidden_act", "another checkpoint"),
        ("dflash_config.causal", True, "causal", "another checkpoint"),
        ("dflash_config.sample_from_anchor", True, "sample_from_anchor", "another checkpoint"),
        ("draft_vocab_size", 200000, "draft_vocab_size 200000", "came with"),
        ("is_neox_style", False, "is_neox_style", "another checkpoint"),
        ("dtype", "int8", "dtype", "bfloat16"),
    ],
)
def test_bad_input_names_the_field_and_the_remedy(
    path: str, value: Any, names: str, remedy: str
) -> None:
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(changed(path, value))
    assert names in str(error.value)
    assert remedy in str(error.value)


def test_bad_files_are_named(tmp_path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(DrafterConfigError, match="does not exist: point at"):
        DrafterConfig.from_pretrained(tmp_path)
    path.write_text('{"block_size": ')
    with pytest.raises(
        DrafterConfigError, match=r"config\.json is not JSON .*fetch the checkpoint again"
    ):
        DrafterConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(changed("block_size", 1)))
    with pytest.raises(DrafterConfigError, match=r"config\.json: block_size is 1"):
        DrafterConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(QWEN3_8B))
    assert DrafterConfig.from_pretrained(tmp_path) == DrafterConfig.from_dict(QWEN3_8B)


def test_changes_are_checked() -> None:
    config = DrafterConfig.from_dict(QWEN3_8B)
    assert config.with_(dtype="float32").dtype == "float32"
    with pytest.raises(DrafterConfigError, match="at least 2"):
        config.with_(block_size=1)


@pytest.mark.parametrize(
    ("target", "tokens", "length", "names"),
    [
        (TargetShape(2560, 36, 151936), 15, 4096, "hidden_size is 2560"),
        (TargetShape(4096, 36, 151000), 15, 4096, "vocab_size is 151000"),
        (TargetShape(4096, 28, 151936), 15, 4096, "number of layers"),
        (TargetShape(4096, 36, 151936), 16, 4096, "Set num_speculative_tokens to 15 or less"),
        (TargetShape(4096, 36, 151936), 0, 4096, "num_speculative_tokens is 0"),
        (TargetShape(4096, 36, 151936), 15, 40961, "--max-model-len 40960 or less"),
    ],
)
def test_a_pair_that_does_not_fit(
    target: TargetShape, tokens: int, length: int, names: str
) -> None:
    with pytest.raises(DrafterConfigError, match=names):
        check_pair(DrafterConfig.from_dict(QWEN3_8B), target, tokens, length)


def test_a_pair_that_fits() -> None:
    check_pair(DrafterConfig.from_dict(QWEN3_8B), TargetShape(4096, 36, 151936), 15, 40960)

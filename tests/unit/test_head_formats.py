"""Published drafters with heads: their configs as published, read, written back, and refused by
name where they ask for what is not served.

Tests: ``pytest tests/unit/test_head_formats.py``.
"""

from typing import Any

import pytest

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import SPECULATORS, parse, published_format, write
from vllm_dflash.weights import expected_tensors

LAYERS: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
    "dtype": "bfloat16",
}
DFLASH2 = LAYERS | {
    "architectures": ["DFlash2DraftModel"],
    "block_size": 8,
    "num_target_layers": 64,
    "layer_types": ["sliding_attention"] * 5,
    "sliding_window": 2048,
    "use_sliding_window": True,
    "dflash_config": {
        "mask_token_id": 248070,
        "target_layer_ids": [1, 16, 31, 46, 61],
        "conv_group_size": 16,
        "conv_kernel_size": 2,
        "selector_rank": 256,
        "selector_top_k": 16,
    },
}
"""z-lab/Qwen3.8-27B-DFlash2."""
DSPARK = LAYERS | {
    "architectures": ["Qwen3DSparkModel"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "block_size": 7,
    "mask_token_id": 151669,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "num_target_layers": 36,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
"""deepseek-ai/dspark_qwen3_8b_block7."""


def test_dflash2_is_read() -> None:
    config = parse(DFLASH2)
    assert (config.kind, config.max_speculative_tokens, config.windows) == (
        "dflash2",
        7,
        (2048,) * 5,
    )
    assert config.head == {"selector_rank": 256, "selector_top_k": 16}
    assert (config.conv_kernel_size, config.conv_group_size) == (2, 16)
    tensors = expected_tensors(config)
    assert tensors["candidate_selector.predecessor_codebook"] == (248320, 256)
    assert tensors["candidate_selector.hidden_projection.weight"] == (256, 5120)
    assert tensors["layers.4.mlp_conv.base_kernel"] == (2, 2, 5120)
    assert tensors["layers.0.attention_conv.kernel_projection.weight"] == (2 * 2 * 320, 5120)


def test_dspark_is_read() -> None:
    config = parse(DSPARK)
    assert (config.kind, config.block_size, config.max_speculative_tokens) == ("dspark", 7, 7)
    assert config.mask_token_id == 151669
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert config.unknown_keys == ()
    tensors = expected_tensors(config)
    assert tensors["markov_head.markov_w1.weight"] == (151936, 256)
    assert tensors["confidence_head.proj.weight"] == (1, 4096 + 256)
    without = {name: value for name, value in DSPARK.items() if "confidence" not in name}
    assert not any("confidence" in name for name in expected_tensors(parse(without)))


@pytest.mark.parametrize("raw", [DFLASH2, DSPARK], ids=["dflash2", "dspark"])
def test_what_is_read_is_written_back(raw: dict[str, Any]) -> None:
    config = parse(raw)
    ours = write(config, published_format(config))
    assert parse(ours) == parse(write(config, SPECULATORS)) == config
    assert ours["architectures"] == raw["architectures"]
    for name in ("markov_rank", "target_layer_ids", "dflash_config"):
        assert (name in ours) == (name in raw)


def test_all_keys_of_published_configs_are_known() -> None:
    """Of a training's own as well, such as ``num_anchors``, and those that say what is so anyway:
    a scale of one was refused."""
    of_training = {"num_anchors": 512, "tie_word_embeddings": False, "use_cache": True}
    config = parse(DSPARK | of_training)
    assert config == parse(DSPARK)
    assert config.unknown_keys == ()
    nested = DFLASH2["dflash_config"] | {"output_multiplier": 1.0}
    assert parse(DFLASH2 | {"dflash_config": nested}) == parse(DFLASH2)


@pytest.mark.parametrize("scale", [1.0, 71.5])
def test_a_factor_of_the_embedding_is_read(scale: float) -> None:
    """Muse-Glimmer's drafter gives one."""
    nested = DFLASH2["dflash_config"] | {"input_embedding_scale": scale}
    config = parse(DFLASH2 | {"dflash_config": nested})
    assert config == parse(DFLASH2).with_(input_embedding_scale=scale)
    for format in (published_format(config), SPECULATORS):
        assert parse(write(config, format)) == config
    assert parse(DSPARK | {"input_embedding_scale": scale}).input_embedding_scale == scale


def test_an_object_beside_the_top_level_is_dsparks_too() -> None:
    """vLLM reads mask_token_id and target_layer_ids of either place."""
    nested = {name: DSPARK[name] for name in ("mask_token_id", "target_layer_ids")}
    raw = {name: value for name, value in DSPARK.items() if name not in nested}
    assert parse(raw | {"dflash_config": nested}) == parse(DSPARK)
    with pytest.raises(DrafterConfigError, match="target_layer_ids"):
        parse(DSPARK | {"dflash_config": nested | {"target_layer_ids": [2, 9, 17, 25, 33]}})


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (DFLASH2, {"selector_rank": None}, "dflash_config.selector_rank is missing"),
        (DFLASH2, {"selector_top_k": 0}, "dflash_config.selector_top_k is 0"),
        (DFLASH2, {"selector_top_k": 512}, "selector_top_k is 512"),
        (DFLASH2, {"conv_group_size": None}, "dflash_config.conv_group_size is missing"),
        (DFLASH2, {"conv_group_size": 3}, "conv_group_size is 3: a divisor of hidden_size"),
        (DFLASH2, {"input_embedding_scale": -1}, "dflash_config.input_embedding_scale is -1"),
        (DFLASH2, {"output_multiplier": 0.5}, "output_multiplier = 0.5 is not supported"),
        (DFLASH2, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (DFLASH2, {"markov_rank": 256}, "dflash_config.markov_rank"),
        (DSPARK, {"markov_head_type": "gru"}, "markov_head_type = 'gru' is not supported"),
        (DSPARK, {"sample_from_anchor": False}, "sample_from_anchor is False.*own method for it"),
        (DSPARK, {"markov_rank": None}, "markov_rank is missing"),
        (DSPARK, {"enable_confidence_head": 1}, "enable_confidence_head"),
        (DSPARK, {"draft_vocab_size": 32000}, "ranks the target's whole vocabulary"),
        (DSPARK, {"mask_token_id": None}, "mask_token_id is None"),
        (DSPARK, {"logit_scale": 2.0}, "logit_scale = 2.0 is not supported"),
    ],
)
def test_refusals(raw: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    place = {"dflash_config": raw["dflash_config"] | changes} if raw is DFLASH2 else changes
    with pytest.raises(DrafterConfigError, match=said):
        parse(raw | place)


def test_speculators_dspark_whose_anchor_predicts_nothing_is_refused() -> None:
    """Its library's default, and ours says which key."""
    raw = write(parse(DSPARK), SPECULATORS)
    del raw["sample_from_anchor"]
    with pytest.raises(DrafterConfigError, match="sample_from_anchor is None"):
        parse(raw)

"""The checkpoint formats: published configs parse to what their model cards say, and every format
reads back what it writes.

pytest tests/unit/test_formats.py
"""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest

from pairs import random_drafter_config
from published import QWEN3_8B
from variants import VARIANTS
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import format_names, is_ours, parse, published_format, tensor_name, write
from vllm_dflash.weights import expected_tensors

# The whole of it, with the fields that say nothing about the drafter.
Z_LAB_QWEN3_8B: dict[str, Any] = QWEN3_8B | {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_window_layers": 5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
}

# AngelSlim/Qwen3-4b-dflare: nine target layers, seven draft layers.
ANGELSLIM_QWEN3_4B: dict[str, Any] = Z_LAB_QWEN3_8B | {
    "architectures": ["QwenDFlareDraftModel"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 7,
    "layer_types": ["full_attention"] * 7,
    "max_window_layers": 7,
    "dflash_config": {
        "mask_token_id": 151669,
        "target_layer_ids": [1, 5, 9, 13, 17, 21, 25, 29, 33],
    },
}

# A drafter as the speculators library writes it: layer ids from one, sliding layers, 32,000 of the
# target's tokens.
SPECULATORS: dict[str, Any] = {
    "architectures": ["DFlashSpeculator"],
    "speculators_model_type": "dflash",
    "speculators_version": "0.5.0",
    "block_size": 8,
    "aux_hidden_state_layer_ids": [2, 10, 18, 26, 34],
    "draft_vocab_size": 32000,
    "dtype": "bfloat16",
    "mask_token_id": 151669,
    "max_anchors": 3072,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "speculators_config": {
        "algorithm": "dflash",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 7, "verifier_accept_k": 1}
        ],
        "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "Qwen/Qwen3-8B"},
    },
    "transformer_layer_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": 2048,
        "use_sliding_window": True,
        "vocab_size": 151936,
    },
}


def test_z_lab() -> None:
    config = parse(Z_LAB_QWEN3_8B)
    assert (config.format, config.kind, config.block_size, config.max_speculative_tokens) == (
        "z-lab",
        "dflash",
        16,
        15,
    )
    assert (config.target_layer_ids, config.num_target_layers, config.mask_token_id) == (
        (1, 9, 17, 25, 33),
        36,
        151669,
    )
    assert (config.windows, config.draft_vocab_size, config.rope_theta, config.rope_scaling) == (
        (None,) * 5,
        None,
        1e6,
        None,
    )
    assert expected_tensors(config)["fc.weight"] == (4096, 5 * 4096)


def test_angelslim() -> None:
    """The published file has 94 tensors and 1,486,452,278 bytes, of which the header is some ten
    thousand: all of it is accounted for."""
    config = parse(ANGELSLIM_QWEN3_4B)
    assert (config.format, config.kind, config.num_hidden_layers, config.num_features) == (
        "AngelSlim",
        "dflare",
        7,
        9,
    )
    tensors = expected_tensors(config)
    assert len(tensors) == 94
    assert tensors["layer_fusion_weights"] == (7, 9)
    assert tensors["layers.6.self_attn.k_proj_target.weight"] == (1024, 2560)
    elements = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors.values())
    assert 5_000 < 1_486_452_278 - 2 * elements < 20_000


def test_speculators() -> None:
    config = parse(SPECULATORS)
    assert (config.format, config.kind, config.draft_vocab_size, config.vocab_size) == (
        "speculators",
        "dflash",
        32000,
        151936,
    )
    assert config.target_layer_ids == (1, 9, 17, 25, 33), (
        "counted from zero here, from one in the file"
    )
    assert (config.windows, config.sliding_causal, config.num_target_layers) == (
        (2048, 2048, None),
        True,
        None,
    )
    tensors = expected_tensors(config)
    assert (tensors["lm_head.weight"], tensors["d2t"]) == ((32000, 4096), (32000,))
    assert not parse(SPECULATORS | {"sliding_window_non_causal": True}).sliding_causal


def test_whether_sliding_layers_are_causal_is_said() -> None:
    """The library takes an absent key for causal, vLLM for non-causal: it was taken for causal
    without a word. By a false one vLLM takes full layers for causal too, so that a drafter without
    sliding layers, which was written with false, drafted something else there."""
    raw = {name: SPECULATORS[name] for name in SPECULATORS if name != "sliding_window_non_causal"}
    for missing in (raw, raw | {"sliding_window_non_causal": None}):
        with pytest.raises(DrafterConfigError, match=r"sliding_window_non_causal is missing.*true"):
            parse(missing)
    full = raw["transformer_layer_config"] | {"layer_types": ["full_attention"] * 3}
    config = parse(raw | {"transformer_layer_config": full})
    assert config.windows == (None, None, None)
    assert write(config, "speculators")["sliding_window_non_causal"] is True


@pytest.mark.parametrize(
    "raw",
    [Z_LAB_QWEN3_8B, ANGELSLIM_QWEN3_4B, SPECULATORS],
    ids=["z-lab", "AngelSlim", "speculators"],
)
def test_a_published_config_survives(raw: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    config = parse(raw)
    assert raw == before, "parsing changed its input"
    for format in (config.format, published_format(config), "speculators"):
        written = json.loads(json.dumps(write(config, format, verifier="Qwen/Qwen3-8B")))
        assert parse(written) == config
    same = write(config, config.format)
    differing = {name for name in raw if same.get(name) != raw[name]}
    assert differing <= {
        "bos_token_id",
        "eos_token_id",
        "speculators_config",
        "speculators_version",
        "transformer_layer_config",
        "max_anchors",
        "target_hidden_size",
        "tie_word_embeddings",
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_every_format(name: str) -> None:
    config = random_drafter_config(**VARIANTS[name].changes)
    for format in (published_format(config), "speculators"):
        read = parse(json.loads(json.dumps(write(config, format))))
        assert (read, read.format) == (config, format)


def test_what_a_format_cannot_hold() -> None:
    dflare = random_drafter_config(kind="dflare")
    with pytest.raises(
        DrafterConfigError,
        match="z-lab holds no dflare drafter: write it as AngelSlim or speculators",
    ):
        write(dflare, "z-lab")
    with pytest.raises(
        DrafterConfigError,
        match="AngelSlim holds no dflash drafter: write it as z-lab or speculators",
    ):
        write(random_drafter_config(), "AngelSlim")
    with pytest.raises(
        DrafterConfigError, match=f"'gguf' is not known: one of {', '.join(format_names())}"
    ):
        write(dflare, "gguf")


def test_vllms_own_name_for_dflare_is_read() -> None:
    """vLLM puts DFlash before an architecture that lacks it, and hands that name on."""
    raw = ANGELSLIM_QWEN3_4B | {"architectures": ["DFlashQwenDFlareDraftModel"]}
    assert parse(raw) == parse(ANGELSLIM_QWEN3_4B)
    assert is_ours(_speculative("dflash", ["DFlashQwenDFlareDraftModel"]))
    assert not is_ours(_speculative("dflash", ["XPressDraftModel"]))
    assert not is_ours(_speculative("dflash", None))
    assert not is_ours(_speculative("eagle3", ["DFlashQwenDFlareDraftModel"]))
    assert not is_ours(None)


def _speculative(method: str, architectures: list[str] | None) -> SimpleNamespace:
    return SimpleNamespace(
        method=method, draft_model_config=SimpleNamespace(architectures=architectures)
    )


def test_tensor_names() -> None:
    assert (
        tensor_name("model.layers.0.mlp.up_proj.weight")
        == tensor_name("layers.0.mlp.up_proj.weight")
        == "layers.0.mlp.up_proj.weight"
    )
    assert tensor_name("draft_id_to_target_id") == "d2t"


def test_dtype_and_block_size_in_their_other_places() -> None:
    assert parse(SPECULATORS | {"dtype": None, "torch_dtype": "float16"}).dtype == "float16"
    layers = SPECULATORS["transformer_layer_config"] | {"dtype": "float32"}
    without = {name: value for name, value in SPECULATORS.items() if name != "dtype"}
    assert (
        DrafterConfig.from_dict(without | {"transformer_layer_config": layers}).dtype == "float32"
    )
    nested = Z_LAB_QWEN3_8B | {
        "block_size": None,
        "dflash_config": Z_LAB_QWEN3_8B["dflash_config"] | {"block_size": 10},
    }
    assert parse(nested).block_size == 10

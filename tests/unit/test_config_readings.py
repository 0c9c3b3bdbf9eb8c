"""What is read from a config: rotation and windows by layer, scales of logits and embeddings, the
kind.

    pytest tests/unit/test_config_readings.py
"""

from typing import Any

import pytest

from broken import refusal
from published import QWEN3_8B
from vllm_dflash.config import DrafterConfig
from vllm_dflash.fields import QUANTIZATION_METHODS
from vllm_dflash.formats import write


def test_rotary_parameters_by_layer_type() -> None:
    """They were passed over, and theta became 1e6."""
    full, sliding = (
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 1e4},
    )
    raw = {name: value for name, value in QWEN3_8B.items() if name != "rope_theta"}
    alike = raw | {"rope_parameters": {"full_attention": full, "sliding_attention": full}}
    assert DrafterConfig.from_dict(alike).rope_theta == 5e5
    # Of a type that no layer is of, nothing is computed.
    assert (
        DrafterConfig.from_dict(
            raw | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
        ).rope_theta
        == 5e5
    )
    mixed = raw | {
        "layer_types": ["full_attention"] * 4 + ["sliding_attention"],
        "sliding_window": 2048,
        "use_sliding_window": True,
    }
    assert (
        refusal(
            mixed | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
        ).field
        == "rope_parameters"
    )
    assert refusal(mixed | {"rope_parameters": {"full_attention": full}}).field == "rope_parameters"
    assert refusal(raw | {"rope_parameters": full, "rope_theta": 1e4}).field == "rope_theta"


def test_sliding_windows_without_layer_types() -> None:
    """``use_sliding_window`` was passed over without ``layer_types``; transformers lets the layers
    from ``max_window_layers`` on slide."""
    raw = {name: value for name, value in QWEN3_8B.items() if name != "layer_types"} | {
        "use_sliding_window": True,
        "sliding_window": 2048,
    }
    assert DrafterConfig.from_dict(raw | {"max_window_layers": 3}).windows == (
        None,
        None,
        None,
        2048,
        2048,
    )
    assert DrafterConfig.from_dict(raw | {"max_window_layers": 28}).windows == (None,) * 5
    assert refusal(raw).field == "use_sliding_window"
    assert DrafterConfig.from_dict(raw | {"use_sliding_window": False}).windows == (None,) * 5
    sliding = QWEN3_8B | {"layer_types": ["sliding_attention"] * 5, "sliding_window": 2048}
    assert refusal(sliding | {"use_sliding_window": False}).field == "use_sliding_window"
    assert DrafterConfig.from_dict(sliding).windows == (2048,) * 5


@pytest.mark.vllm
def test_quantization_methods_are_vllms() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as THEIRS

    assert set(THEIRS) == QUANTIZATION_METHODS


def test_scales_of_logits_are_read_for_probabilities() -> None:
    """They were of no effect: drafts are drawn, and confidences told, by probabilities."""
    said = {"final_logit_softcapping": 30, "logits_scaling": 4.0, "logit_scale": 0.5}
    config = DrafterConfig.from_dict(QWEN3_8B | said)
    assert (config.logit_scale, config.logit_cap) == (0.125, 30.0)
    for format in ("z-lab", "speculators"):
        assert DrafterConfig.from_dict(write(config, format)) == config
    for name in ("logit_scale", "logits_scaling", "output_multiplier", "output_multiplier_scale"):
        for value, scale in ((None, 1.0), (2.0, 0.5 if name == "logits_scaling" else 2.0)):
            assert DrafterConfig.from_dict(QWEN3_8B | {name: value}).logit_scale == scale
        assert refusal(QWEN3_8B | {name: 1e-40}).field == name


def nested(**said: Any) -> dict[str, Any]:
    return QWEN3_8B | {"dflash_config": QWEN3_8B["dflash_config"] | said}


def test_scales_in_either_place() -> None:
    """In ``dflash_config``, where z-lab's code and vLLM's look first, they were passed over; said
    twice in speculators' format, a factor counted twice."""
    config = DrafterConfig.from_dict(nested(final_logit_softcapping=30.0, output_multiplier=0.5))
    assert (config.logit_scale, config.logit_cap) == (0.5, 30.0)
    for name in ("final_logit_softcapping", "logit_scale", "input_embedding_scale"):
        one = DrafterConfig.from_dict(QWEN3_8B | {name: 3.0})
        assert one == DrafterConfig.from_dict(nested(**{name: 3.0}) | {name: 3.0})
        assert one == DrafterConfig.from_dict(nested(**{name: 3.0}))
        assert one != DrafterConfig.from_dict(QWEN3_8B)
        both = nested(**{name: 3.0}) | {name: 2.0}
        assert refusal(both).field == f"dflash_config.{name}"
    raw = write(DrafterConfig.from_dict(QWEN3_8B), "speculators")
    inner = raw["transformer_layer_config"]
    said = {"logit_scale": 2.0, "transformer_layer_config": inner | {"logit_scale": 2.0}}
    assert DrafterConfig.from_dict(raw | said).logit_scale == 2.0
    inside = {"transformer_layer_config": inner | {"input_embedding_scale": 1.0}}
    assert refusal(raw | inside).field == "input_embedding_scale"


@pytest.mark.parametrize("name", ["projector_type", "model_arch"])
def test_another_kinds_name_beside_the_architecture(name: str) -> None:
    """``projector_type: dspark`` at the top of a DFlash file was taken, and its tensors refused."""
    for other in ("dspark", "dflare", "domino"):
        assert refusal(QWEN3_8B | {name: other}).field == name
        raw = write(DrafterConfig.from_dict(QWEN3_8B), "speculators")
        assert refusal(raw | {name: other}).field == name
    assert DrafterConfig.from_dict(QWEN3_8B | {name: "dflash"}).kind == "dflash"


@pytest.mark.parametrize(
    ("architectures", "scale"),
    [
        (["Gemma4ForConditionalGeneration"], 1.0),
        (["PaliGemmaForConditionalGeneration"], 1.0),
        (["Qwen3ForCausalLM"], None),
        ([], None),
        (3, None),
    ],
)
def test_the_library_trains_on_rows_of_gemmas_embedding(
    architectures: Any, scale: float | None
) -> None:
    raw = write(DrafterConfig.from_dict(QWEN3_8B), "speculators")
    raw["speculators_config"]["verifier"]["architectures"] = architectures
    config = DrafterConfig.from_dict(raw)
    assert config.input_embedding_scale == scale
    assert DrafterConfig.from_dict(write(config, "z-lab")) == config
    again = DrafterConfig.from_dict(raw | {"input_embedding_scale": 8.0})
    assert again.input_embedding_scale == 8.0

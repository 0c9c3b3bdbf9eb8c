"""What all formats write alike: the drafter's layers, as transformers has them for a Qwen3 model.

pytest tests/unit/test_formats.py tests/unit/test_config.py
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_dflash import fields
from vllm_dflash.config import DEFAULT_RMS_NORM_EPS, DEFAULT_ROPE_THETA, DrafterConfig
from vllm_dflash.formats.keys import CAP, EMBEDDING_SCALE, FACTORS, SCALES
from vllm_dflash.formats.rope import read_rope
from vllm_dflash.kinds import Kind, Setting

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def read_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all formats write alike."""
    sizes = {name: fields.positive_int(raw, name) for name in _SIZES}
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise fields.bad(
            "hidden_act",
            f"is {fields.shown(act)}",
            "only silu is supported; use another checkpoint",
        )
    if raw.get("target_hidden_size") not in (None, sizes["hidden_size"]):
        raise fields.bad(
            "target_hidden_size",
            f"= {fields.shown(raw['target_hidden_size'])} is not hidden_size"
            f" {sizes['hidden_size']}",
            "the drafter shares the target's embedding; use another checkpoint",
        )
    head_dim = fields.optional_positive_int(raw, "head_dim")
    if head_dim is None and sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise fields.bad(
            "head_dim",
            f"is missing, and hidden_size {sizes['hidden_size']} is no multiple of"
            f" num_attention_heads {sizes['num_attention_heads']}",
            f"it cannot be derived. {fields.CAME_WITH}",
        )
    theta, scaling = read_rope(
        raw, DEFAULT_ROPE_THETA, _layer_kinds(raw, sizes["num_hidden_layers"])
    )
    return sizes | {
        "head_dim": head_dim or sizes["hidden_size"] // sizes["num_attention_heads"],
        "rms_norm_eps": fields.positive_float(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": fields.flag(raw, "attention_bias"),
    }


def read_attention(
    raw: Mapping[str, Any], layers: Mapping[str, Any], nested: Mapping[str, Any]
) -> tuple[tuple[int | None, ...], bool]:
    """Sliding window per layer, and whether sliding layers are causal, as vLLM reads the fields of
    the published checkpoints."""
    sliding = [
        kind == "sliding_attention"
        for kind in _layer_kinds(layers, fields.positive_int(layers, "num_hidden_layers"))
    ]
    for place, name in ((layers, "sliding_window"), (nested, "dflash_config.swa_window_size")):
        fields.optional_positive_int(place, name)
    marked = any(sliding)
    if fields.flag(nested, "dflash_config.use_swa") and not marked:
        sliding = [True] * len(sliding)
    causal, said = fields.optional_flag(raw, "is_causal"), "is_causal"
    if fields.optional_flag(nested, "dflash_config.causal") is not None and causal is None:
        causal, said = nested["causal"], "dflash_config.causal"
    fields.agree("is_causal", causal, "dflash_config.causal", nested.get("causal"))
    if causal and not all(sliding):
        raise fields.bad(
            said,
            "= True with full-attention layers is not supported",
            "a block's tokens see each other; use another checkpoint",
        )
    if not any(sliding):
        return (), False
    window = fields.optional_positive_int(
        nested, "dflash_config.swa_window_size"
    ) or fields.positive_int(layers, "sliding_window")
    return tuple(window if slides else None for slides in sliding), (
        marked if causal is None else causal
    )


def _layer_kinds(raw: Mapping[str, Any], count: int) -> Sequence[str]:
    """The type of each of the ``count`` layers, as transformers reads the fields of a Qwen3
    model."""
    kinds, slides = raw.get("layer_types"), fields.flag(raw, "use_sliding_window")
    if raw.get("max_window_layers") is not None and (
        not fields.is_int(raw["max_window_layers"]) or raw["max_window_layers"] < 0
    ):
        raise fields.bad(
            "max_window_layers",
            f"is {fields.shown(raw['max_window_layers'])}",
            f"give a whole number, or remove it. {fields.CAME_WITH}",
        )
    if kinds is None:
        if not slides or raw.get("sliding_window") is None:
            return ["full_attention"] * count
        first = raw.get("max_window_layers")
        if first is None:
            raise fields.bad(
                "use_sliding_window",
                "is true without layer_types or max_window_layers",
                f"give {count} layer_types, one a layer",
            )
        return ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    if not fields.is_list(kinds) or len(kinds) != count:
        raise fields.bad(
            "layer_types",
            f"is {fields.shown(kinds)}",
            f"give {count} entries, one a layer (num_hidden_layers)",
        )
    unknown = sorted({str(kind) for kind in kinds} - set(fields.LAYER_TYPES))
    if unknown:
        raise fields.bad(
            "layer_types",
            f"holds {fields.shown(unknown)}",
            "only full_attention and sliding_attention are supported; use another checkpoint",
        )
    if "sliding_attention" in kinds and raw.get("use_sliding_window") is False:
        raise fields.bad(
            "use_sliding_window",
            "is false beside layer_types with sliding_attention: transformers takes such layers for"
            " full ones",
            "set it to true, or give full_attention, as the drafter was trained. "
            + fields.CAME_WITH,
        )
    return [str(kind) for kind in kinds]


def write_layers(config: DrafterConfig) -> dict[str, Any]:
    """The fields that describe them, by name."""
    windows = config.windows
    return {
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "dtype": config.dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "sliding_window": next((w for w in windows if w is not None), None),
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": any(w is not None for w in windows),
    } | {name: getattr(config, name) for name in _SIZES}


def draft_vocab(raw: Mapping[str, Any], layers: Mapping[str, Any]) -> int | None:
    """The size of the draft vocabulary; None where it is the whole of ``layers``' one."""
    if raw.get("draft_vocab_size") is None:
        return None
    size = fields.positive_int(raw, "draft_vocab_size")
    return None if size == layers["vocab_size"] else size


def read_head(kind: Kind, raw: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The settings of the kind's head, which ``raw`` holds under keys with ``place`` before
    them."""
    return {
        name: _setting(setting, raw, f"{place}{name}")
        for name, setting in kind.head.settings.items()
    }


def _setting(setting: Setting, raw: Mapping[str, Any], name: str) -> Any:
    value = raw.get(name.rpartition(".")[2])
    if setting.absent is not None and value is None:
        return setting.absent
    if isinstance(setting.default, bool):
        return fields.flag(raw, name)
    if isinstance(setting.default, float):
        return fields.positive_float(raw, name)
    if setting.least == 0 and fields.is_int(value) and value == 0:
        return 0
    return fields.positive_int(raw, name)


def read_scales(raw: Mapping[str, Any], inner: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What becomes of logits before they are probabilities; of several factors the product.

    Args:
        inner: the object in ``raw`` that may say it as well, or ``raw`` itself; ``path`` is its
            name, with a dot behind it, or nothing.
    """
    said: dict[str, float] = {}
    for name in SCALES:
        if path:
            fields.agree(f"{path}{name}", inner.get(name), name, raw.get(name))
        for place, at in ((inner, path), (raw, "")):
            if place.get(name) is not None:
                said.setdefault(name, fields.positive_float(place, f"{at}{name}"))
    cap = said.pop(CAP, None)
    scale = math.prod(value ** FACTORS[name] for name, value in said.items())
    return {"logit_scale": float(scale), "logit_cap": cap}


def read_embedding_scale(
    raw: Mapping[str, Any], inner: Mapping[str, Any], path: str
) -> float | None:
    """What rows of the embedding are multiplied by; None where neither says; places as in
    ``read_scales``."""
    name = EMBEDDING_SCALE
    if path:
        fields.agree(f"{path}{name}", inner.get(name), name, raw.get(name))
    for place, at in ((inner, path), (raw, "")):
        if place.get(name) is not None:
            return fields.positive_float(place, f"{at}{name}")
    return None


def write_scales(config: DrafterConfig) -> dict[str, Any]:
    """These fields, where they say something."""
    out: dict[str, Any] = {}
    if config.logit_scale != 1.0:
        out["logit_scale"] = config.logit_scale
    if config.logit_cap is not None:
        out[CAP] = config.logit_cap
    return out


def write_embedding_scale(config: DrafterConfig) -> dict[str, Any]:
    """That field, where it is given."""
    scale = config.input_embedding_scale
    return {} if scale is None else {EMBEDDING_SCALE: scale}


_CONVOLUTION = ("conv_kernel_size", "conv_group_size")


def keys_of(kind: Kind) -> set[str]:
    """The keys that only some kinds have."""
    return {*kind.head.settings, *kind.head.says, *(_CONVOLUTION if kind.convolves else ())}


def read_convolution(kind: Kind, raw: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The fields of the convolution, where the kind may have one and ``raw`` says so."""
    if not kind.convolves or raw.get(_CONVOLUTION[0]) in (None, 0):
        return {}
    return {name: fields.positive_int(raw, f"{place}{name}") for name in _CONVOLUTION}


def write_convolution(config: DrafterConfig) -> dict[str, Any]:
    """Those fields, where it has one."""
    if not config.conv_kernel_size:
        return {}
    return {name: getattr(config, name) for name in _CONVOLUTION}

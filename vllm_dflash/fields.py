"""Reads single fields of a ``config.json``: each by its type and range, with the remedy in the
message of every refusal.

Pure Python. ``raw`` is always the object that holds the field; ``name`` may be dotted, and its last
part is the key.

    pytest tests/unit/test_broken_configs.py
"""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from vllm_dflash.config import DrafterConfigError

LAYER_TYPES = ("full_attention", "sliding_attention")
CAME_WITH = "Use the config.json that the checkpoint came with"
_MOST = {
    "num_hidden_layers": 1024,
    "num_target_layers": 1024,
    "block_size": 1024,
    "rms_norm_eps": 0.1,
}
_MOST_OF_ANY_SIZE = 2**31 - 1
"""Above these a field is a slip of the pen; lists as long as the field would be made of it before
anything else notices."""

QUANTIZATION_METHODS = frozenset(
    {
        "awq",
        "auto_awq",
        "fp8",
        "fbgemm_fp8",
        "fp_quant",
        "modelopt",
        "modelopt_fp4",
        "modelopt_mxfp8",
        "modelopt_mixed",
        "auto_gptq",
        "gptq",
        "gptq_marlin",
        "awq_marlin",
        "humming",
        "compressed-tensors",
        "experts_int8",
        "quark",
        "moe_wna16",
        "torchao",
        "inc",
        "mxfp4",
        "gpt_oss_mxfp4",
        "deepseek_v4_fp8",
        "online",
        "fp8_per_tensor",
        "fp8_per_block",
        "fp8_per_channel",
        "int8_per_channel_weight_only",
        "nvfp4_per_token",
        "mxfp8",
    }
)
"""What vLLM 0.32 has layers for; ``tests/unit/test_config_keys.py`` compares."""

_SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""What vLLM's rotary embeddings read of a scaling, without a default of their own."""
_OTHER_SCALING_FIELDS = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_mscale", "long_mscale"),
}
"""What they read with a default of their own."""
_NEUTRAL_ROPE = {"partial_rotary_factor": (1,), "mrope_interleaved": (False,), "use_fope": (False,)}
"""Values that say what is so without them."""


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def json_type(value: Any) -> str:
    """What JSON calls it, for a message: ``null``, ``a list``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if is_number(value):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if is_list(value) else "an object"


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list of JSON."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def bad(name: str, state: str, remedy: str) -> DrafterConfigError:
    """The refusal of a field: ``state`` goes on after its name."""
    return DrafterConfigError(f"{name} {state}", remedy, field=name)


def shown(value: Any) -> str:
    """A field's value in a message: whole where it is short."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


_LONGEST_VALUE = 200


def positive_int(raw: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 1."""
    value = _value(raw, name)
    if not is_int(value) or value <= 0:
        raise bad(
            name, _state(value), f"config.json must give a positive whole number. {CAME_WITH}"
        )
    _check_most(name, value, _MOST.get(_key(name), _MOST_OF_ANY_SIZE))
    return value


def optional_positive_int(raw: Mapping[str, Any], name: str) -> int | None:
    """The same, or None where the field is absent or null."""
    return None if _value(raw, name) is None else positive_int(raw, name)


def positive_float(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0; ``default`` where the field is absent or null, if there is one."""
    value = _value(raw, name)
    if value is None and default is not None:
        return default
    if not is_number(value) or not 0 < value <= _LARGEST_FLOAT:
        raise bad(name, _state(value), f"config.json must give a positive number. {CAME_WITH}")
    _check_most(name, value, _MOST.get(_key(name), math.inf))
    return float(value)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number of JSON; NaN and infinity, which JSON has not, are left to the
    range."""
    return isinstance(value, int | float) and not isinstance(value, bool)


_LARGEST_FLOAT = sys.float_info.max


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """True or false; false where the field is absent or null."""
    return bool(optional_flag(raw, name))


def optional_flag(raw: Mapping[str, Any], name: str) -> bool | None:
    """True, false, or None where the field is absent or null."""
    value = _value(raw, name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"is {shown(value)}", f"true or false. {CAME_WITH}")
    return value


def token_id(raw: Mapping[str, Any], name: str) -> int:
    """A token id; its range is the vocabulary's."""
    value = _value(raw, name)
    if not is_int(value) or value < 0:
        raise bad(name, f"is {shown(value)}", "give the token id that the drafter was trained with")
    return value


def layer_ids(value: Any, name: str, *, one_based: bool = False) -> tuple[int, ...]:
    """Target layers, zero-based whatever the file counts from; whether the target has them is for
    ``DrafterConfig.check``."""
    counted = "one-based" if one_based else "zero-based"
    if not is_list(value) or not value or not all(map(is_int, value)):
        raise bad(name, f"is {shown(value)}", f"give a list of {counted} target layers")
    if one_based and min(value) < 1:
        raise bad(
            name,
            f"is {shown(value)}",
            "in this format they count from 1; give a list of one-based target layers",
        )
    return tuple(i - one_based for i in value)


def agree(name: str, value: Any, other: str, theirs: Any) -> None:
    """Refuses two places of one setting that both give it, and differ: one would win in silence.

    Raises:
        DrafterConfigError: names both, and ``name`` as the field.
    """
    if None not in (value, theirs) and value != theirs:
        raise bad(
            name,
            f"is {shown(value)}, and {other} is {shown(theirs)}",
            f"give the value that the drafter was trained with, once. {CAME_WITH}",
        )


def dtype(*sources: Mapping[str, Any]) -> str:
    """The first ``dtype`` or (older) ``torch_dtype`` that one of ``sources`` gives; bfloat16 where
    none does."""
    given = [
        (name, raw[name])
        for raw in sources
        for name in ("dtype", "torch_dtype")
        if raw.get(name) is not None
    ]
    for name, value in given:
        if value not in ("bfloat16", "float16", "float32"):
            raise bad(name, f"is {shown(value)}", f"one of bfloat16, float16, float32. {CAME_WITH}")
    for raw in sources:
        agree("dtype", raw.get("dtype"), "torch_dtype", raw.get("torch_dtype"))
    return str(given[0][1]) if given else "bfloat16"


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` as it is, for vLLM to read; None for plain weights."""
    value = raw.get("quantization_config")
    if value is None:
        return None
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if not isinstance(method, str) or not method:
        raise bad(
            "quantization_config",
            f"is {shown(value)}",
            "give an object whose quant_method names how the weights are packed, or null."
            f" {CAME_WITH}",
        )
    if method not in QUANTIZATION_METHODS:
        raise DrafterConfigError(
            f"quantization_config.quant_method is {shown(method)}, which vLLM has no layers for",
            f"one of {', '.join(sorted(QUANTIZATION_METHODS))}. {CAME_WITH}",
            field="quantization_config.quant_method",
        )
    return value


def rope(
    raw: Mapping[str, Any], default_theta: float, kinds: Collection[str]
) -> tuple[float, Mapping[str, Any] | None]:
    """The rotary base and the rest of its parameters; transformers 5 writes both into
    ``rope_parameters``.

    Args:
        kinds: the layer types that the drafter has: some files give parameters by layer type.
    """
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise bad(
                name,
                f"is {shown(value)}",
                "give an object such as {'rope_type': 'yarn', 'factor': 4.0}, or null",
            )
        shared = _of_layer_types(name, value or {}, kinds)
        for key in shared.keys() & merged.keys():
            agree(f"{name}.{key}", shared[key], f"rope_parameters.{key}", merged[key])
        merged |= {key: each for key, each in shared.items() if each is not None}
    theta = merged.pop("rope_theta", None)
    for place in (raw, {"rope_theta": theta}):
        positive_float(place, "rope_theta", default_theta)
    if None not in (theta, raw.get("rope_theta")) and theta != raw["rope_theta"]:
        raise bad(
            "rope_theta", f"is {raw['rope_theta']!r}, and {theta!r} in rope_parameters", CAME_WITH
        )
    theta = positive_float(
        {"rope_theta": theta} if raw.get("rope_theta") is None else raw, "rope_theta", default_theta
    )
    older = merged.pop("type", None)
    where = "rope_parameters" if raw.get("rope_scaling") is None else "rope_scaling"
    agree(f"{where}.rope_type", merged.get("rope_type"), "type beside it", older)
    kind = merged.get("rope_type") if older is None else older
    if kind is None and "factor" in merged:
        raise bad(
            where, "has a factor and no rope_type", f"name it, such as linear or yarn. {CAME_WITH}"
        )
    if kind is not None and not isinstance(kind, str):
        raise bad(
            f"{where}.rope_type",
            f"is {shown(kind)}",
            f"give its name, such as yarn, or null for {where}",
        )
    if kind in (None, "default"):
        _check_rope(merged, "default", where)
        return theta, None
    scaling = {name: value for name, value in merged.items() if value is not None} | {
        "rope_type": kind
    }
    _check_rope(scaling, kind, where)
    return theta, {name: value for name, value in scaling.items() if name not in _NEUTRAL_ROPE}


def _of_layer_types(
    name: str, given: Mapping[str, Any], kinds: Collection[str]
) -> Mapping[str, Any]:
    """``given``, or where it holds parameters by layer type, those that all of the drafter's types
    share."""
    nested = {
        key: value
        for key, value in given.items()
        if isinstance(value, Mapping) and key not in _ROPE_NAMES
    }
    if not nested:
        return given
    ours = [nested.get(kind) for kind in kinds]
    if (
        len(nested) < len(given)
        or not set(nested) <= set(LAYER_TYPES)
        or None in ours
        or any(each != ours[0] for each in ours)
    ):
        raise bad(
            name,
            f"is {shown(dict(given))}: rotary parameters by layer type are supported only where all"
            " layers have the same",
            "use another checkpoint, or convert it with one set of parameters if it was trained"
            " with one",
        )
    return nested[next(iter(kinds))]


def _check_rope(given: Mapping[str, Any], kind: str, place: str) -> None:
    """Refuses parameters that this kind of scaling needs and has not, and those that nothing here
    computes with."""
    needed = _SCALING_FIELDS.get(kind, ())
    for name in needed:
        _check_scaling(given, f"{place}.{name}")
    for name, value in given.items():
        if (
            name in needed
            or name == "rope_type"
            or value is None
            or _is_neutral(value, _NEUTRAL_ROPE.get(name, ()))
        ):
            continue
        if name in _OTHER_SCALING_FIELDS.get(kind, ()):
            if name == "truncate":
                flag(given, f"{place}.{name}")
            else:
                _check_scaling(given, f"{place}.{name}")
        elif kind == "default" and name in _SCALING_NAMES:
            _check_scaling(
                given, f"{place}.{name}"
            )  # some files keep them beside a type that does not read them
        elif kind in (*_SCALING_FIELDS, "default"):
            raise bad(
                f"{place}.{name}",
                f"= {shown(value)} is not supported for rope_type {kind}, and ignoring it would"
                " only show as low acceptance",
                _ROPE_REMEDIES.get(name, "use another checkpoint"),
            )


_SCALING_NAMES = frozenset(name for names in _SCALING_FIELDS.values() for name in names)
_ROPE_NAMES = frozenset(
    {"type", "rope_type", "rope_theta", "mrope_section", *_NEUTRAL_ROPE, *_SCALING_NAMES}.union(
        *_OTHER_SCALING_FIELDS.values()
    )
)
"""Parameters of rotary positions: no layer type is called so."""
_ROPE_REMEDIES = {
    "partial_rotary_factor": (
        "remove it from config.json if the drafter was trained with rotary positions in the whole"
        " head, as some were whose file repeats the target's value; vllm-dflash doctor then says"
        " what is accepted. Else use another checkpoint"
    ),
    "mrope_section": (
        "remove it from config.json if the drafter was trained on text, where it changes nothing;"
        " else use another checkpoint"
    ),
}


def _check_scaling(scaling: Mapping[str, Any], path: str) -> None:
    name = _key(path)
    if name in ("short_factor", "long_factor"):
        value = scaling.get(name)
        if (
            not is_list(value)
            or not value
            or not all(is_number(f) and 0 < f <= _LARGEST_FLOAT for f in value)
        ):
            raise bad(path, f"is {shown(value)}", f"give a list of numbers. {CAME_WITH}")
    elif name.startswith("original"):
        positive_int(scaling, path)
    else:
        positive_float(scaling, path)


def check_scaling(scaling: Mapping[str, Any], head_dim: int) -> None:
    """Refuses parameters of a scaling, each of its type, that do not fit each other or the heads.

    Args:
        scaling: ``rope_type`` and its parameters.
        head_dim: all of it is rotated.

    Raises:
        DrafterConfigError: names the first.
    """
    for name in ("short_factor", "long_factor"):
        count = len(scaling.get(name, ()))
        if scaling.get("rope_type") == "longrope" and count != head_dim // 2:
            raise bad(
                f"rope_scaling.{name}",
                f"has length {count}",
                f"give {head_dim // 2} numbers, one a pair of head_dim's {head_dim}. {CAME_WITH}",
            )
    for kind, low, high in (
        ("llama3", "low_freq_factor", "high_freq_factor"),
        ("yarn", "beta_slow", "beta_fast"),
    ):
        least, most = (scaling.get(name, _YARN.get(name)) for name in (low, high))
        if scaling.get("rope_type") == kind and None not in (least, most) and least >= most:
            raise bad(
                f"rope_scaling.{low}",
                f"is {least}, not below {high}, which is {most}",
                f"they bound a range of frequencies. {CAME_WITH}",
            )


_YARN = {"beta_slow": 1, "beta_fast": 32}
"""vLLM's and transformers' defaults."""


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    # By type too: True equals 1.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def refuse(raw: Mapping[str, Any], name: str, *neutral: Any) -> None:
    """Refuses a field that changes what a drafter computes, in a way that is not implemented,
    unless its value is ``neutral``."""
    value = _value(raw, name)
    if value is not None and not _is_neutral(value, neutral):
        raise bad(
            name,
            f"= {shown(value)} is not supported, and ignoring it would only show as low acceptance",
            "use another checkpoint",
        )


def _value(raw: Mapping[str, Any], name: str) -> Any:
    return raw.get(_key(name))


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _state(value: Any) -> str:
    return "is missing" if value is None else f"is {shown(value)}"


def _check_most(name: str, value: float, most: float) -> None:
    if value > most:
        raise bad(name, f"is {shown(value)}", f"more than {most} is no drafter's. {CAME_WITH}")

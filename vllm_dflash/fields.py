"""Reads single fields of a ``config.json``: each by its type and range, with the remedy in the
message of every refusal.

Pure Python. ``raw`` is always the object that holds the field; ``name`` may be dotted, and its last
part is the key.

    pytest tests/unit/test_broken_configs.py
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vllm_dflash.errors import DrafterConfigError

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


def check_positive_floats(raw: Mapping[str, Any], name: str) -> None:
    """Refuses what is no list of finite numbers above 0."""
    value = _value(raw, name)
    if (
        not is_list(value)
        or not value
        or not all(is_number(each) and 0 < each <= _LARGEST_FLOAT for each in value)
    ):
        raise bad(name, f"is {shown(value)}", f"give a list of numbers. {CAME_WITH}")


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


def is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether it is one of ``neutral``, values that say what is so without the field."""
    # By type too: True equals 1.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def refuse(raw: Mapping[str, Any], name: str, *neutral: Any) -> None:
    """Refuses a field that changes what a drafter computes, in a way that is not implemented,
    unless its value is ``neutral``."""
    value = _value(raw, name)
    if value is not None and not is_neutral(value, neutral):
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

"""Reads single fields of a ``config.json``: each by its type and range, with the remedy in the message of every refusal.

Pure Python. ``raw`` is always the object that holds the field; ``name`` may be dotted, and its last part is the key.

    pytest tests/unit/test_broken_configs.py
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vllm_dflash.config import DrafterConfigError

CAME_WITH = "Use the config.json that the checkpoint came with"
_MOST = {"num_hidden_layers": 1024, "num_target_layers": 1024, "block_size": 1024, "rms_norm_eps": 0.1}
_MOST_OF_ANY_SIZE = 2**31 - 1
"""Above these a field is a slip of the pen; lists as long as the field would be made of it before anything else notices."""

_SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""What vLLM's rotary embeddings read of a scaling, without a default of their own."""


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list of JSON."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def positive_int(raw: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 1."""
    value = _value(raw, name)
    if not is_int(value) or value <= 0:
        state = "missing" if value is None else f"{value!r}"
        raise DrafterConfigError(f"{name} is {state}: config.json must give a positive whole number. {CAME_WITH}")
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        state = "missing" if value is None else f"{value!r}"
        raise DrafterConfigError(f"{name} is {state}: config.json must give a positive number. {CAME_WITH}")
    _check_most(name, value, _MOST.get(_key(name), math.inf))
    return float(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """True or false; false where the field is absent or null."""
    return bool(optional_flag(raw, name))


def optional_flag(raw: Mapping[str, Any], name: str) -> bool | None:
    """True, false, or None where the field is absent or null."""
    value = _value(raw, name)
    if value is not None and not isinstance(value, bool):
        raise DrafterConfigError(f"{name} is {value!r}: true or false. {CAME_WITH}")
    return value


def token_id(raw: Mapping[str, Any], name: str) -> int:
    """A token id; its range is the vocabulary's."""
    value = _value(raw, name)
    if not is_int(value) or value < 0:
        raise DrafterConfigError(f"{name} is {value!r}: give the token id that the drafter was trained with")
    return value


def layer_ids(value: Any, name: str, *, one_based: bool = False) -> tuple[int, ...]:
    """Target layers, zero-based whatever the file counts from; whether the target has them is for ``DrafterConfig.check``."""
    counted = "one-based" if one_based else "zero-based"
    if not is_list(value) or not value or not all(map(is_int, value)):
        raise DrafterConfigError(f"{name} is {value!r}: give a list of {counted} target layers")
    if one_based and min(value) < 1:
        raise DrafterConfigError(f"{name} is {value!r}: in this format they count from 1; give a list of one-based target layers")
    return tuple(i - one_based for i in value)


def dtype(*sources: Mapping[str, Any]) -> str:
    """The first ``dtype`` or (older) ``torch_dtype`` that one of ``sources`` gives; bfloat16 where none does."""
    given = [value for raw in sources for value in (raw.get("dtype"), raw.get("torch_dtype")) if value is not None]
    name = given[0] if given else "bfloat16"
    if name not in ("bfloat16", "float16", "float32"):
        raise DrafterConfigError(f"dtype is {name!r}: one of bfloat16, float16, float32. {CAME_WITH}")
    return str(name)


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` as it is, for vLLM to read; None for plain weights."""
    value = raw.get("quantization_config")
    if value is None:
        return None
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if not isinstance(method, str) or not method:
        raise DrafterConfigError(
            f"quantization_config is {value!r}: give an object whose quant_method names how the weights are packed, or null. {CAME_WITH}"
        )
    return value


def rope(raw: Mapping[str, Any], default_theta: float) -> tuple[float, Mapping[str, Any] | None]:
    """The rotary base and the rest of its parameters; transformers 5 writes both into ``rope_parameters``."""
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise DrafterConfigError(f"{name} is {value!r}: give an object such as {{'rope_type': 'yarn', 'factor': 4.0}}, or null")
        merged |= value or {}
    theta = merged.pop("rope_theta", None)
    theta = positive_float({"rope_theta": theta} if raw.get("rope_theta") is None else raw, "rope_theta", default_theta)
    older = merged.pop("type", None)
    kind = merged.get("rope_type") if older is None else older
    if kind is None and "factor" in merged:
        raise DrafterConfigError(f"rope_scaling has a factor and no rope_type: name it, such as linear or yarn. {CAME_WITH}")
    if kind is not None and not isinstance(kind, str):
        raise DrafterConfigError(f"rope_scaling's rope_type is {kind!r}: give its name, such as yarn, or null for rope_scaling")
    if kind in (None, "default"):
        return theta, None
    scaling = merged | {"rope_type": kind}
    for name in _SCALING_FIELDS.get(kind, ()):
        if name in ("short_factor", "long_factor"):
            if not is_list(scaling.get(name)) or not all(isinstance(f, int | float) for f in scaling[name]):
                raise DrafterConfigError(f"rope_scaling.{name} is {scaling.get(name)!r}: give a list of numbers. {CAME_WITH}")
        elif name.startswith("original"):
            positive_int(scaling, f"rope_scaling.{name}")
        else:
            positive_float(scaling, f"rope_scaling.{name}")
    return theta, scaling


def refuse(raw: Mapping[str, Any], prefix: str, *names: str) -> None:
    """Refuses fields that change what a drafter computes, in ways that are not implemented."""
    for name in names:
        if raw.get(name) not in (None, False):
            raise DrafterConfigError(
                f"{prefix}{name} = {raw[name]!r} is not supported, and ignoring it would only show as low acceptance: use another checkpoint"
            )


def _value(raw: Mapping[str, Any], name: str) -> Any:
    return raw.get(_key(name))


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _check_most(name: str, value: float, most: float) -> None:
    if value > most:
        raise DrafterConfigError(f"{name} is {value!r}: more than {most} is no drafter's. {CAME_WITH}")

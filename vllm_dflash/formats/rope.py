"""Reads the rotary parameters of a drafter, and judges whether a scaling is whole and fits.

pytest tests/unit/test_config.py tests/unit/test_broken_configs.py
"""

from collections.abc import Collection, Mapping
from typing import Any

from vllm_dflash import fields

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
_SCALING_NAMES = frozenset(name for names in _SCALING_FIELDS.values() for name in names)
_NEUTRAL_ROPE = {"partial_rotary_factor": (1,), "mrope_interleaved": (False,), "use_fope": (False,)}
"""Values that say what is so without them."""
_ROPE_NAMES = frozenset(
    {"type", "rope_type", "rope_theta", "mrope_section", *_NEUTRAL_ROPE, *_SCALING_NAMES}.union(
        *_OTHER_SCALING_FIELDS.values()
    )
)
"""Parameters of rotary positions: no layer type is called so."""
_ROPE_REMEDIES = {
    "partial_rotary_factor": (
        "remove it from config.json if the drafter was trained with rotary positions in the whole"
        " head, as some were whose file repeats the target's value; vllm-dflash doctor drafts by"
        " both readings and says which one is accepted. Else use another checkpoint"
    ),
    "mrope_section": (
        "remove it from config.json if the drafter was trained on text, where it changes nothing;"
        " else use another checkpoint"
    ),
}


def read_rope(
    raw: Mapping[str, Any], default_theta: float, kinds: Collection[str]
) -> tuple[float, Mapping[str, Any] | None]:
    """The rotary base and the rest of its parameters; transformers 5 writes both into
    ``rope_parameters``.

    Args:
        kinds: the layer types that the drafter has: some files give parameters by layer type.

    Raises:
        DrafterConfigError: names the first that is wrong or not supported.
    """
    merged = _merged(raw, kinds)
    theta = merged.pop("rope_theta", None)
    for place in (raw, {"rope_theta": theta}):
        fields.positive_float(place, "rope_theta", default_theta)
    if None not in (theta, raw.get("rope_theta")) and theta != raw["rope_theta"]:
        raise fields.bad(
            "rope_theta",
            f"is {raw['rope_theta']!r}, and {theta!r} in rope_parameters",
            fields.CAME_WITH,
        )
    theta = fields.positive_float(
        {"rope_theta": theta} if raw.get("rope_theta") is None else raw, "rope_theta", default_theta
    )
    older = merged.pop("type", None)
    where = "rope_parameters" if raw.get("rope_scaling") is None else "rope_scaling"
    fields.agree(f"{where}.rope_type", merged.get("rope_type"), "type beside it", older)
    kind = merged.get("rope_type") if older is None else older
    if kind is None and "factor" in merged:
        raise fields.bad(
            where,
            "has a factor and no rope_type",
            f"name it, such as linear or yarn. {fields.CAME_WITH}",
        )
    if kind is not None and not isinstance(kind, str):
        raise fields.bad(
            f"{where}.rope_type",
            f"is {fields.shown(kind)}",
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


def _merged(raw: Mapping[str, Any], kinds: Collection[str]) -> dict[str, Any]:
    """The parameters of both objects that may hold them, which must agree."""
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise fields.bad(
                name,
                f"is {fields.shown(value)}",
                "give an object such as {'rope_type': 'yarn', 'factor': 4.0}, or null",
            )
        shared = _of_layer_types(name, value or {}, kinds)
        for key in shared.keys() & merged.keys():
            fields.agree(f"{name}.{key}", shared[key], f"rope_parameters.{key}", merged[key])
        merged |= {key: each for key, each in shared.items() if each is not None}
    return merged


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
        or not set(nested) <= set(fields.LAYER_TYPES)
        or None in ours
        or any(each != ours[0] for each in ours)
    ):
        raise fields.bad(
            name,
            f"is {fields.shown(dict(given))}: rotary parameters by layer type are supported only"
            " where all layers have the same",
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
            or fields.is_neutral(value, _NEUTRAL_ROPE.get(name, ()))
        ):
            continue
        if name in _OTHER_SCALING_FIELDS.get(kind, ()):
            if name == "truncate":
                fields.flag(given, f"{place}.{name}")
            else:
                _check_scaling(given, f"{place}.{name}")
        elif kind == "default" and name in _SCALING_NAMES:
            # Some files keep them beside a type that does not read them.
            _check_scaling(given, f"{place}.{name}")
        elif kind in (*_SCALING_FIELDS, "default"):
            raise fields.bad(
                f"{place}.{name}",
                f"= {fields.shown(value)} is not supported for rope_type {kind}, and ignoring it"
                " would only show as low acceptance",
                _ROPE_REMEDIES.get(name, "use another checkpoint"),
            )


def _check_scaling(scaling: Mapping[str, Any], path: str) -> None:
    """Refuses a parameter that is not of its type."""
    name = path.rpartition(".")[2]
    if name in ("short_factor", "long_factor"):
        fields.check_positive_floats(scaling, path)
    elif name.startswith("original"):
        fields.positive_int(scaling, path)
    else:
        fields.positive_float(scaling, path)


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
            raise fields.bad(
                f"rope_scaling.{name}",
                f"has length {count}",
                f"give {head_dim // 2} numbers, one a pair of head_dim's {head_dim}."
                f" {fields.CAME_WITH}",
            )
    for kind, low, high in (
        ("llama3", "low_freq_factor", "high_freq_factor"),
        ("yarn", "beta_slow", "beta_fast"),
    ):
        least, most = (scaling.get(name, _YARN.get(name)) for name in (low, high))
        if scaling.get("rope_type") == kind and None not in (least, most) and least >= most:
            raise fields.bad(
                f"rope_scaling.{low}",
                f"is {least}, not below {high}, which is {most}",
                f"they bound a range of frequencies. {fields.CAME_WITH}",
            )


_YARN = {"beta_slow": 1, "beta_fast": 32}
"""vLLM's and transformers' defaults."""

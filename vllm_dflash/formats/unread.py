"""Judges every key of a ``config.json`` that no setting of the drafter is read from.

pytest tests/unit/test_config_keys.py
"""

from collections.abc import Container, Mapping
from typing import Any

from vllm_dflash import fields, kinds
from vllm_dflash.formats import keys

_NULL_IS_REFUSED = (
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
    "use_sliding_window",
    "max_window_layers",
    "hidden_act",
)
_NONE = (0, False)
_JUDGED = frozenset().union(
    keys.READ,
    keys.NO_EFFECT,
    keys.OF_THE_KIND,
    keys.OF_TRANSFORMERS,
    keys.OF_VLLM,
    keys.READ_ELSEWHERE,
    keys.LENGTHS,
)
"""Keys that are judged in every file alike, whatever another package's head calls its own."""
_LONGEST = 1e30
"""What transformers writes for a length without an end."""


def check_keys(
    raw: Mapping[str, Any], kind: kinds.Kind, *, by_transformers: bool, known: Container[str] = ()
) -> list[str]:
    """Judges every key of ``raw``, a file of a drafter of ``kind``, that no setting of it is read
    from; returns those that are not known.

    Args:
        by_transformers: whether transformers reads this object at vLLM's start, which takes null
            for no setting of a type.
        known: keys of the kind's head, which are read.

    Raises:
        DrafterConfigError: names a key that would change what is computed, or that holds what it
            cannot.
    """
    unknown, refused = [], _refused()
    for name, value in raw.items():
        name = str(name)
        if name in known:
            continue
        if name in keys.OF_THE_KIND:
            fields.refuse(raw, name, kind.name)
        elif name in refused:
            fields.refuse(raw, name, *refused[name])
        elif name in keys.NO_EFFECT:
            fits, wanted, nullable = keys.NO_EFFECT[name]
            if not fits(value) and not (value is None and (nullable or not by_transformers)):
                raise fields.bad(
                    name,
                    f"is {fields.shown(value)}",
                    f"give {wanted}, or remove it. {fields.CAME_WITH}",
                )
        elif _is_read_elsewhere(name, value):
            raise fields.bad(
                name,
                f"= {fields.shown(value)} is not supported: transformers or vLLM reads a key of"
                " this name for something else than the drafter",
                f"{keys.READ_REMEDIES.get(name, 'remove it')}. {fields.CAME_WITH}",
            )
        elif name in keys.LENGTHS:
            _check_length(raw, name)
        elif "sink" in name:  # of attention, which every model spells in its own way
            fields.refuse(raw, name, False, 0)
        elif name not in keys.READ:
            unknown.append(name)
    if by_transformers:
        _check_for_transformers(raw)
    return unknown


def _refused() -> Mapping[str, tuple[Any, ...]]:
    """``keys.REFUSED``, and the settings of heads, each with the values that say it has none."""
    return dict.fromkeys(kinds.setting_names() - _JUDGED, _NONE) | keys.REFUSED


def _is_read_elsewhere(name: str, value: Any) -> bool:
    # A null counts too where it takes the place of an attribute.
    return (
        name in keys.OF_TRANSFORMERS | keys.OF_VLLM
        or name.startswith("__")
        or (name in keys.READ_ELSEWHERE and value is not None)
    )


def _check_length(raw: Mapping[str, Any], name: str) -> None:
    """Refuses another name of the drafter's length that is none, or is less than
    ``max_position_embeddings``: beyond it vLLM would draft nothing, without a word."""
    value, reach = raw[name], raw.get("max_position_embeddings")
    if value is None:
        return
    if not fields.is_int(value) or not 0 < value <= _LONGEST:
        raise fields.bad(
            name,
            f"is {fields.shown(value)}, and vLLM reads a draft model's length by it",
            f"give a positive whole number, or remove it. {fields.CAME_WITH}",
        )
    if fields.is_int(reach) and value < reach:
        raise fields.bad(
            name,
            f"is {value}, and vLLM would draft no further; max_position_embeddings is {reach}",
            f"remove it, or make it {reach}. {fields.CAME_WITH}",
        )


def check_dflash_config(
    nested: Mapping[str, Any], kind: kinds.Kind, known: Container[str] = ()
) -> None:
    """The same for ``dflash_config`` of a drafter of ``kind``, all of which is about what the
    drafter computes: an unknown key is refused there."""
    refused = _refused()
    for name in nested:
        path = f"dflash_config.{name}"
        if name in keys.OF_THE_KIND:
            fields.refuse(nested, path, kind.name)
            continue
        if name in keys.NO_EFFECT or name in keys.DFLASH_CONFIG or name in known:
            continue
        if name not in refused and nested[name] not in (None, False):
            raise fields.bad(
                path,
                f"= {fields.shown(nested[name])} is not known here, and ignoring it might only show"
                " as low acceptance",
                "use a newer vllm-dflash, or remove it from config.json if the drafter computes"
                " nothing with it",
            )
        fields.refuse(nested, path, *refused.get(name, (False,)))
    fields.refuse(nested, "dflash_config.sample_from_anchor", False)


def check_head(
    kind: kinds.Kind,
    raw: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    absent_from_anchor: bool = True,
) -> None:
    """Refuses what the kind's head and first row do not do.

    Args:
        settings: where the head's own keys are.
        absent_from_anchor: what a file says of a kind whose anchor's row predicts by giving no
            ``sample_from_anchor``.
    """
    if kind.first_row:
        fields.refuse(raw, "sample_from_anchor", False, 0)
    elif raw.get("sample_from_anchor", absent_from_anchor) not in (True, 1):
        raise fields.bad(
            "sample_from_anchor",
            f"is {fields.shown(raw.get('sample_from_anchor'))}",
            f"a {kind.label} drafter is served here only where its anchor's row predicts too"
            " (true): use one that was trained so, or vLLM's own method for it, where it has one",
        )
    for place in (raw, settings):
        for name in (kinds.said_names() - _JUDGED) | kind.head.says.keys():
            allowed = (kind.head.says[name],) if name in kind.head.says else ()
            fields.refuse(place, name, *allowed)
        if not kind.head.is_argmax:
            for name in keys.SCALES:
                fields.refuse(place, name, 1)


def _check_for_transformers(raw: Mapping[str, Any]) -> None:
    """What transformers refuses at vLLM's start, without a remedy and sometimes without a name."""
    kind = raw.get("model_type")
    if kind not in keys.MODEL_TYPES:
        state = "is missing" if kind is None else f"is {fields.shown(kind)}"
        raise fields.bad(
            "model_type",
            state,
            f"one of {', '.join(keys.MODEL_TYPES)}: vLLM reads the file by it. {fields.CAME_WITH}",
        )
    for name in _NULL_IS_REFUSED:
        if name in raw and raw[name] is None:
            raise fields.bad(name, "is null", f"give a value, or remove it. {fields.CAME_WITH}")

"""The flat format of Tencent/AngelSpec's trainer: no ``dflash_config``, another count under
``num_target_layers``, and DFlare under DFlash's architecture.

pytest tests/unit/test_angelspec.py
"""

from collections.abc import Mapping
from typing import Any

from vllm_dflash import fields, kinds
from vllm_dflash.config import DrafterConfig

ANGELSPEC = "AngelSpec"
MODEL_TYPE = "dflash"
"""What it may write, and transformers does not know."""
_DEPTH, _CAPTURED = "target_num_hidden_layers", "num_target_layers"
OWN_KEYS = frozenset({"fusion_type", "gate_temperature", "_angelspec_version"})
"""Keys that no other format has, and that are judged here."""


def is_angelspec(raw: Mapping[str, Any]) -> bool:
    """Whether the contents of a ``config.json`` are in this format."""
    if raw.get("dflash_config") is not None:
        return False
    return raw.get(_DEPTH) is not None or _published_here(raw)


def _published_here(raw: Mapping[str, Any]) -> bool:
    given = raw.get("architectures")
    return fields.is_list(given) and any(
        kind.format == ANGELSPEC and {kind.architecture, kind.served_architecture} & set(given)
        for kind in kinds.every().values()
        if all(isinstance(name, str) for name in given)
    )


def kind_in(raw: Mapping[str, Any], named: kinds.Kind) -> kinds.Kind:
    """The kind of a file in this format whose architecture is that of ``named``.

    Raises:
        DrafterConfigError: ``model_arch`` is no kind's that is written under it.
    """
    said = raw.get("model_arch")
    if said in (None, named.name):
        return named
    found = kinds.every().get(said) if isinstance(said, str) else None
    if found is None or not _is_exported(found, named.architecture):
        known = [named.name] + [
            kind.name for kind in kinds.every().values() if _is_exported(kind, named.architecture)
        ]
        raise fields.bad(
            "model_arch",
            f"is {fields.shown(said)}",
            f"one of {', '.join(known)}, or leave it out; another is not known here",
        )
    return found


def _is_exported(kind: kinds.Kind, architecture: str) -> bool:
    return kind.exported_as == architecture and kind.head.is_argmax


def as_published(raw: Mapping[str, Any], kind: kinds.Kind) -> dict[str, Any]:
    """The same settings as ``published.py`` reads them.

    Raises:
        DrafterConfigError: names a key that is missing, or that says what is not supported.
    """
    if raw.get("block_size") is None:
        raise fields.bad(
            "block_size",
            "is missing: AngelSpec's trainer does not write it, and no tensor shows it",
            "write in the rows of a block in training (its dflash_block_size, 16 unless it was set;"
            " 8 where the name ends in -B8 or -Block8)",
        )
    if raw.get("rope_theta") is None and not isinstance(raw.get("rope_parameters"), Mapping):
        raise fields.bad(
            "rope_theta",
            "is missing, of which AngelSpec makes 10000 and others 1000000",
            f"write in the one that the drafter was trained with. {fields.CAME_WITH}",
        )
    fields.refuse(raw, "fusion_type", "concat_fc")
    captured = fields.optional_positive_int(raw, _CAPTURED)
    ids = raw.get("target_layer_ids")
    if captured is not None and fields.is_list(ids) and captured != len(ids):
        raise fields.bad(
            _CAPTURED,
            f"is {captured} beside {len(ids)} target_layer_ids, which it counts in this format",
            f"the target's depth is {_DEPTH}. {fields.CAME_WITH}",
        )
    depth = fields.optional_positive_int(raw, _DEPTH)
    out = {name: value for name, value in raw.items() if name not in (_DEPTH, _CAPTURED)}
    out.pop("model_arch", None)
    if out.get("model_type") == MODEL_TYPE:
        out["model_type"] = "qwen3"
    return out | {"architectures": [kind.architecture], _CAPTURED: depth}


def written(config: DrafterConfig, published: Mapping[str, Any]) -> dict[str, Any]:
    """What ``published.py`` writes of a flat kind, with this format's counts."""
    out = {name: value for name, value in published.items() if name != _CAPTURED}
    out |= {_CAPTURED: config.num_features, "target_hidden_size": config.hidden_size}
    if config.num_target_layers is not None:
        out[_DEPTH] = config.num_target_layers
    return dict(sorted(out.items()))

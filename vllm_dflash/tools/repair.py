"""Everything that is wrong with a ``config.json`` at once: the parser stops at the first field, so
that field is set right and it reads on.

pytest tests/unit/test_tools.py
"""

import copy
from collections.abc import Mapping
from typing import Any

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError

_NEUTRAL: dict[str, Any] = {
    "hidden_size": 2**20,
    "head_dim": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "vocab_size": 2**31 - 1,
    "max_position_embeddings": 1,
    "block_size": 2,
    "mask_token_id": 0,
    "target_layer_ids": [0],
    "aux_hidden_state_layer_ids": [1],
    "num_target_layers": 1024,
    "sliding_window": 2**20,
    "model_type": "qwen3",
    "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0]},
}
"""A value for each field that a drafter must have, which no check of another field stumbles over;
every other one is taken out."""
_ALONG = {
    "layer_types": ("causal", "is_causal"),
    "target_layer_ids": ("aux_hidden_state_layer_ids",),
    "rope_scaling": ("rope_parameters",),
    "rope_parameters": ("rope_scaling",),
}
"""Fields that are checked against a field, and would be blamed for the value that was put there."""
_WHOLE = ("architectures", "speculators_model_type", "transformer_layer_config")
"""Without these nothing more can be said of the file."""


def config_problems(raw: Any) -> list[DrafterConfigError]:
    """The refusals of every field of ``raw``, the contents of a ``config.json``; empty where it
    parses."""
    problems: list[DrafterConfigError] = []
    raw, repaired = copy.deepcopy(raw), set[str]()
    while True:
        try:
            DrafterConfig.from_dict(raw)
        except DrafterConfigError as error:
            # The outermost key in the object that holds it: parts of a rotary scaling are set right
            # together.
            field = error.field.removeprefix("dflash_config.").partition(".")[0]
            if field in repaired:
                return problems
            problems.append(error)
            if not field or field in _WHOLE:
                return problems
            repaired.add(field)
            _set(raw, (field, *_ALONG.get(field, ())), _fitting(raw, field))
        else:
            return problems


def _fitting(raw: dict[str, Any], field: str) -> dict[str, Any]:
    """Values that have to fit another field of the file, which may still be right."""
    nested = raw.get("transformer_layer_config")
    layers = nested if isinstance(nested, dict) else raw
    kinds, kv_heads = layers.get("layer_types"), layers.get("num_key_value_heads")
    if field == "num_hidden_layers" and isinstance(kinds, list) and kinds:
        return {field: len(kinds)}
    if field == "num_attention_heads" and isinstance(kv_heads, int) and kv_heads > 0:
        return {field: kv_heads}
    # Without it, it is derived from the other two.
    return (
        {"head_dim": 2}
        if field in ("hidden_size", "num_attention_heads") and layers.get("head_dim") is None
        else {}
    )


def _set(raw: dict[str, Any], names: tuple[str, ...], fitting: Mapping[str, Any]) -> None:
    """Sets fields in the object and its two nested ones: which of them a field belongs to depends
    on the format."""
    for place in (raw, raw.get("dflash_config"), raw.get("transformer_layer_config")):
        if isinstance(place, dict):
            for name in {*names, *fitting}:
                there = place.pop(name, None) is not None
                if (
                    place is raw.get("dflash_config")
                    and not there
                    and name not in _NEUTRAL["dflash_config"]
                ):
                    continue
                if name in fitting or (
                    name in _NEUTRAL and (place is raw or name != "dflash_config")
                ):
                    place[name] = (
                        fitting[name] if name in fitting else copy.deepcopy(_NEUTRAL[name])
                    )

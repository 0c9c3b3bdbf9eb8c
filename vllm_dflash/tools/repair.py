"""Everything that is wrong with a ``config.json`` at once: the parser stops at the first field, so that field is set right and it reads on.

pytest tests/unit/test_tools.py
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from vllm_dflash.config import DrafterConfig, DrafterConfigError

_NEUTRAL: dict[str, Any] = {
    "hidden_size": 2**20, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1, "num_hidden_layers": 1,
    "vocab_size": 2**31 - 1, "max_position_embeddings": 1, "block_size": 2, "mask_token_id": 0, "target_layer_ids": [0],
    "aux_hidden_state_layer_ids": [1], "num_target_layers": 1024, "sliding_window": 2**20, "swa_window_size": None, "use_swa": None,
    "layer_types": None, "causal": None, "is_causal": None, "rope_scaling": None, "rope_parameters": None, "rope_theta": None,
    "rms_norm_eps": None, "dtype": "bfloat16", "attention_bias": None, "hidden_act": "silu", "draft_vocab_size": None,
    "quantization_config": None, "use_sliding_window": None, "sliding_window_non_causal": None, "sample_from_anchor": None,
    "attention_sink_bias": None, "attention_value_scale": None, "add_swa_attention_sink_bias": None, "rope_interleaved": None,
    "is_neox_style": None, "partial_rotary_factor": None, "target_hidden_size": None,
    "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0]},
}  # fmt: skip
"""A value for each field that no check of another field stumbles over."""
_ALONG = {"layer_types": ("causal", "is_causal"), "target_layer_ids": ("aux_hidden_state_layer_ids",)}
"""Fields that are checked against a field, and would be blamed for the value that was put there."""


def config_problems(raw: Any) -> list[str]:
    """The refusals of every field of ``raw``, the contents of a ``config.json``; empty where it parses."""
    problems: list[str] = []
    raw, repaired = copy.deepcopy(raw), set[str]()
    while True:
        try:
            DrafterConfig.from_dict(raw)
        except DrafterConfigError as error:
            problems.append(str(error))
            field = _field(str(error))
            if field is None or field in repaired:
                return problems[:-1] if field else problems
            repaired.add(field)
            _set(raw, {name: copy.deepcopy(_NEUTRAL[name]) for name in (field, *_ALONG.get(field, ()))} | _fitting(raw, field))
        else:
            return problems


def _field(message: str) -> str | None:
    """The field that a refusal names first, if it can be set right."""
    words = re.match(r"[a-z0-9_.]+", message)
    parts = words[0].split(".") if words else []
    return next((part for part in reversed(parts) if part in _NEUTRAL), None)


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
    return {"head_dim": 2} if field in ("hidden_size", "num_attention_heads") and layers.get("head_dim") is None else {}


def _set(raw: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets ``values`` in the object and its two nested ones: which of them a field belongs to depends on the format."""
    for place in (raw, raw.get("dflash_config"), raw.get("transformer_layer_config")):
        if isinstance(place, dict):
            place |= {name: value for name, value in values.items() if place is raw or name != "dflash_config"}

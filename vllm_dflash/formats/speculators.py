"""The speculators library's format: the drafter's layers in ``transformer_layer_config``, layer ids
counted from one.

    pytest tests/unit/test_formats.py tests/unit/test_config.py
"""

from collections.abc import Mapping
from typing import Any

from vllm_dflash import fields, kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.formats.keys import EMBEDDING_SCALE
from vllm_dflash.formats.layers import (
    draft_vocab,
    keys_of,
    read_attention,
    read_convolution,
    read_embedding_scale,
    read_head,
    read_layers,
    read_scales,
    write_convolution,
    write_embedding_scale,
    write_layers,
    write_scales,
)
from vllm_dflash.formats.unread import check_head, check_keys

SPECULATORS = "speculators"
_NON_CAUSAL = "sliding_window_non_causal"


def parse_speculators(raw: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that such a ``config.json`` describes; see ``formats.parse``."""
    kind = raw["speculators_model_type"]
    if kind not in kinds.names():
        raise fields.bad(
            "speculators_model_type",
            f"is {fields.shown(kind)}, not one of {', '.join(kinds.names())}",
            "serve it with vLLM itself",
        )
    layers = raw.get("transformer_layer_config")
    if not isinstance(layers, Mapping):
        raise fields.bad(
            "transformer_layer_config",
            "is missing" if layers is None else f"is {fields.shown(layers)}",
            f"it describes the drafter's layers. {fields.CAME_WITH}",
        )
    ids = fields.layer_ids(
        raw.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids", one_based=True
    )
    check_head(kinds.every()[kind], raw, raw, absent_from_anchor=False)
    known = {*keys_of(kinds.every()[kind]), EMBEDDING_SCALE}
    unknown = check_keys(raw, kinds.every()[kind], by_transformers=False, known=known)
    unknown += [
        f"transformer_layer_config.{name}"
        for name in check_keys(layers, kinds.every()[kind], by_transformers=False)
    ]
    # Not a field of the library's; ours, so that converting there and back loses nothing.
    depth = fields.optional_positive_int(raw, "num_target_layers")
    scale = read_embedding_scale(raw, raw, "")
    windows, _ = read_attention(layers, layers, {})
    non_causal = fields.optional_flag(raw, _NON_CAUSAL)
    if windows and non_causal is None:
        raise fields.bad(
            _NON_CAUSAL,
            "is missing beside sliding layers, and the library and vLLM differ in what that means",
            "set it to true where a sliding layer's tokens see later ones of their block, as it was"
            f" trained, else to false. {fields.CAME_WITH}",
        )
    return DrafterConfig(
        **read_layers(layers),
        block_size=fields.positive_int(raw, "block_size"),
        mask_token_id=fields.token_id(raw, "mask_token_id"),
        target_layer_ids=ids,
        num_target_layers=depth,
        draft_vocab_size=draft_vocab(raw, layers),
        sliding_windows=windows,
        sliding_causal=bool(windows) and not non_causal,
        quantization_config=fields.quantization(raw),
        dtype=fields.dtype(raw, layers),
        head=read_head(kinds.every()[kind], raw),
        **read_convolution(kinds.every()[kind], raw),
        kind=kind,
        unknown_keys=tuple(sorted(unknown)),
        **read_scales(raw, layers, "transformer_layer_config."),
        input_embedding_scale=1.0 if scale is None and _is_gemmas(raw) else scale,
        format=SPECULATORS,
    )


def _is_gemmas(raw: Mapping[str, Any]) -> bool:
    """Whether the library trained it for a Gemma target: it embeds by a copy of that one's table,
    without the factor after it, and so does vLLM. What a file was converted from does not say."""
    place = raw.get("speculators_config")
    verifier = place.get("verifier") if isinstance(place, Mapping) else None
    names = verifier.get("architectures") if isinstance(verifier, Mapping) else None
    return fields.is_list(names) and any(
        isinstance(name, str) and "gemma" in name.lower() for name in names
    )


def write_speculators(config: DrafterConfig, verifier: str) -> dict[str, Any]:
    """The contents of ``config.json``; ``verifier`` is the target's name or path."""
    kind = kinds.kind_of(config)
    out = {
        "architectures": [kind.speculators_architecture],
        "speculators_model_type": kind.name,
        "speculators_config": {
            "algorithm": kind.name,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.max_speculative_tokens}
            ],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_tokens,
        "dtype": config.dtype,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": kind.first_row == 0,
        # Of sliding layers; by false vLLM itself (0.32, 0.33) takes full ones for causal too.
        _NON_CAUSAL: not config.sliding_causal,
        "transformer_layer_config": write_layers(config),
    }
    out |= {**config.head, **write_convolution(config), **write_scales(config)}
    out |= write_embedding_scale(config)
    if config.num_target_layers is not None:
        out["num_target_layers"] = config.num_target_layers
    if config.quantization_config is not None:
        out["quantization_config"] = dict(config.quantization_config)
    return out

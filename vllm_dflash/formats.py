"""Checkpoint formats: every known ``config.json`` to one ``DrafterConfig`` and back; the one map of
tensor names.

A kind's published format is told by ``architectures``, that of the speculators library, which holds
all kinds, by ``speculators_model_type``; ``vllm_dflash.kinds`` has the names.

Pure Python. A field that would change what the drafter computes and is not known here is refused:
ignored, it would only show as low acceptance. Tests: ``pytest tests/unit/test_formats.py``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dflash import fields, keys, kinds
from vllm_dflash.config import (
    DEFAULT_RMS_NORM_EPS,
    DEFAULT_ROPE_THETA,
    DrafterConfig,
    DrafterConfigError,
    default_target_layer_ids,
)
from vllm_dflash.regular import read_regular

CONFIG_FILE = "config.json"
_LARGEST_CONFIG = 1 << 24
METHOD = "dflash"
"""vLLM's name of the method of speculation that its drafters and ours come under."""
SPECULATORS = "speculators"

IGNORED_TENSORS = frozenset(
    {"t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq"}
)
"""Tensors that only training needs."""
_TENSOR_ALIASES = {"draft_id_to_target_id": "d2t"}

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def format_names() -> tuple[str, ...]:
    """All formats: those that kinds were published in, and speculators'."""
    return (*dict.fromkeys(kind.format for kind in kinds.every().values()), SPECULATORS)


def published_format(config: DrafterConfig) -> str:
    """The format that the drafter's kind was published in."""
    return kinds.kind_of(config).format


def tensor_name(name: str) -> str:
    """Our name of a checkpoint's tensor: z-lab's, which all formats share but for a prefix and a
    few aliases."""
    name = name.removeprefix("model.")
    return _TENSOR_ALIASES.get(name, name)


def is_ours(speculative: Any) -> bool:
    """Whether a vLLM ``SpeculativeConfig``, or None, is for a drafter that this package serves."""
    if speculative is None or speculative.method != METHOD:
        return False
    architectures: list[str] = speculative.draft_model_config.architectures or []
    return len(architectures) == 1 and architectures[0] in kinds.architectures()


def is_foreign(raw: Any) -> bool:
    """Whether the contents of a ``config.json`` name another drafter of vLLM's method ``dflash``,
    which is not ours to judge."""
    if not isinstance(raw, Mapping):
        return False
    kind, architectures = raw.get("speculators_model_type"), raw.get("architectures")
    if isinstance(kind, str) and kind:
        return kind not in kinds.names()
    if (
        not isinstance(architectures, list)
        or not architectures
        or not all(isinstance(name, str) for name in architectures)
    ):
        return False
    return not set(architectures) & kinds.architectures().keys()


def read(folder: str | Path) -> DrafterConfig:
    """Reads ``folder/config.json``; errors name the file.

    Raises:
        DrafterConfigError: as ``parse``, or the file is absent or no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    raw = read_raw(folder)
    try:
        return parse(raw)
    except DrafterConfigError as error:
        raise error.at(path) from None


def read_raw(folder: str | Path) -> Any:
    """The contents of ``folder/config.json``, sound or not.

    Raises:
        DrafterConfigError: the file is absent, no regular file, too large or no JSON.
    """
    path = Path(folder) / CONFIG_FILE
    data = read_regular(path, _LARGEST_CONFIG)
    if data is None:
        raise DrafterConfigError(
            f"{path} does not exist",
            "point at a folder that holds a drafter's config.json and safetensors",
        )
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DrafterConfigError(
            f"{path} is not JSON ({error})", "fetch the checkpoint again"
        ) from None


def parse(raw: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that the contents of a ``config.json`` describe.

    Raises:
        DrafterConfigError: a field is missing, of the wrong type, out of range or of a kind not
            supported.
    """
    if not isinstance(raw, Mapping):
        raise DrafterConfigError(
            f"it holds {type(raw).__name__}, not an object of settings",
            "use the config.json that the checkpoint came with",
        )
    config = _parse_speculators(raw) if "speculators_model_type" in raw else _parse_plain(raw)
    try:
        config.check()
    except DrafterConfigError as error:
        if config.format == SPECULATORS and error.field == "target_layer_ids":
            raise error.with_remedy(
                "This format calls them aux_hidden_state_layer_ids and counts from one"
            ) from None
        raise
    return config


def write(config: DrafterConfig, format: str, *, verifier: str = "") -> dict[str, Any]:
    """The contents of ``config.json`` for this drafter in ``format``; ``parse`` reads it back
    unchanged.

    Args:
        verifier: for speculators, the target's name or path.

    Raises:
        DrafterConfigError: the format cannot hold this drafter.
    """
    if format not in format_names():
        raise DrafterConfigError(
            f"format {format!r} is not known", f"one of {', '.join(format_names())}"
        )
    return (
        _write_speculators(config, verifier)
        if format == SPECULATORS
        else _write_plain(config, format)
    )


def _parse_plain(raw: Mapping[str, Any]) -> DrafterConfig:
    """The formats that kinds were published in, which share their keys."""
    kind = kinds.architectures()[_architecture(raw)]
    nested = raw.get("dflash_config")
    if not isinstance(nested, Mapping):
        raise fields.bad(
            "dflash_config",
            "is missing" if nested is None else f"is {fields.shown(nested)}",
            f"it holds mask_token_id and target_layer_ids. {fields.CAME_WITH}",
        )
    keys.check_dflash_config(nested)
    depth = fields.optional_positive_int(raw, "num_target_layers")
    transformer = _transformer(raw)
    if nested.get("target_layer_ids") is None:
        raise _no_layers(depth, transformer["num_hidden_layers"])
    # Newer checkpoints hold the block size beside the mask token.
    for place, name in ((raw, "block_size"), (nested, "dflash_config.block_size")):
        fields.optional_positive_int(place, name)
    block_size = fields.positive_int(
        raw if raw.get("block_size") is not None else {"block_size": nested.get("block_size")},
        "block_size",
    )
    windows, causal = _attention(raw, raw, nested)
    return DrafterConfig(
        **transformer,
        block_size=block_size,
        mask_token_id=fields.token_id(nested, "dflash_config.mask_token_id"),
        target_layer_ids=fields.layer_ids(
            nested["target_layer_ids"], "dflash_config.target_layer_ids"
        ),
        num_target_layers=depth,
        draft_vocab_size=_draft_vocab(raw, raw),
        sliding_windows=windows,
        sliding_causal=causal,
        quantization_config=fields.quantization(raw),
        dtype=fields.dtype(raw),
        kind=kind.name,
        unknown_keys=tuple(sorted(keys.check_keys(raw, by_transformers=True))),
        format=kind.format,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    """The one architecture that the file gives, by its published name or vLLM's."""
    given = raw.get("architectures")
    known = (
        [name for name in given if name in kinds.architectures()] if fields.is_list(given) else []
    )
    if not known:
        raise fields.bad(
            "architectures",
            f"is {fields.shown(given)}, none of"
            f" {', '.join(kind.architecture for kind in kinds.every().values())}",
            f"this is no {kinds.labels()} drafter. Point 'model' in the speculative config at the"
            " drafter's folder",
        )
    if given is None or len(given) > 1:
        raise fields.bad(
            "architectures", f"is {fields.shown(given)}", f"give a list of one. {fields.CAME_WITH}"
        )
    return known[0]


def _no_layers(depth: int | None, num_hidden_layers: int) -> DrafterConfigError:
    """The refusal of a file without target layers.

    z-lab's own code and SGLang take ``default_target_layer_ids`` then, vLLM's dflash its layers for
    EAGLE-3; a drafter that was trained on others drafts from what it has never seen, and nothing
    but acceptance would tell.
    """
    rule = ""
    if depth is not None and depth >= 4:
        ids = ", ".join(map(str, default_target_layer_ids(num_hidden_layers, depth)))
        rule = (
            f" If the drafter was trained by DFlash's rule for {num_hidden_layers} draft layers and"
            f" {depth} of the target's, they are [{ids}]: write them in, and vllm-dflash doctor"
            " says what is accepted with them and with their neighbours."
        )
    return fields.bad(
        "dflash_config.target_layer_ids",
        "is missing",
        f"give a list of zero-based target layers.{rule} {fields.CAME_WITH}",
    )


def _parse_speculators(raw: Mapping[str, Any]) -> DrafterConfig:
    """The speculators library's format: the drafter's layers in ``transformer_layer_config``, layer
    ids counted from one."""
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
    fields.refuse(
        raw, "sample_from_anchor", *((False, 0) if kinds.every()[kind].first_row else (True, 1))
    )
    unknown = keys.check_keys(raw, by_transformers=False)
    unknown += [
        f"transformer_layer_config.{name}"
        for name in keys.check_keys(layers, by_transformers=False)
    ]
    # Not a field of the library's; ours, so that converting there and back loses nothing.
    depth = fields.optional_positive_int(raw, "num_target_layers")
    windows, _ = _attention(layers, layers, {})
    sliding_causal = not fields.flag(raw, "sliding_window_non_causal") and bool(windows)
    return DrafterConfig(
        **_transformer(layers),
        block_size=fields.positive_int(raw, "block_size"),
        mask_token_id=fields.token_id(raw, "mask_token_id"),
        target_layer_ids=ids,
        num_target_layers=depth,
        draft_vocab_size=_draft_vocab(raw, layers),
        sliding_windows=windows,
        sliding_causal=sliding_causal,
        quantization_config=fields.quantization(raw),
        dtype=fields.dtype(raw, layers),
        kind=kind,
        unknown_keys=tuple(sorted(unknown)),
        format=SPECULATORS,
    )


def _transformer(raw: Mapping[str, Any]) -> dict[str, Any]:
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
    theta, scaling = fields.rope(
        raw, DEFAULT_ROPE_THETA, _layer_kinds(raw, sizes["num_hidden_layers"])
    )
    return sizes | {
        "head_dim": head_dim or sizes["hidden_size"] // sizes["num_attention_heads"],
        "rms_norm_eps": fields.positive_float(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": fields.flag(raw, "attention_bias"),
    }


def _attention(
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


def _write_plain(config: DrafterConfig, format: str) -> dict[str, Any]:
    kind = kinds.kind_of(config)
    if kind.format != format:
        raise DrafterConfigError(
            f"{format} holds no {kind.name} drafter", f"write it as {kind.format} or {SPECULATORS}"
        )
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.sliding_windows:
        nested["causal"] = config.sliding_causal
        if config.sliding_causal and None in config.sliding_windows:
            nested.pop(
                "causal"
            )  # vLLM's reading of a mixed drafter without it: causal in the sliding layers
    out = {
        "architectures": [kind.architecture],
        "block_size": config.block_size,
        "dflash_config": nested,
    }
    out |= _write_transformer(config)
    if config.num_target_layers is not None:
        out["num_target_layers"] = config.num_target_layers
    if config.draft_vocab_size is not None:
        out["draft_vocab_size"] = config.draft_vocab_size
    if config.quantization_config is not None:
        out["quantization_config"] = dict(config.quantization_config)
    return dict(sorted(out.items()))


def _write_speculators(config: DrafterConfig, verifier: str) -> dict[str, Any]:
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
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "dtype": config.dtype,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": kind.first_row == 0,
        "sliding_window_non_causal": bool(config.sliding_windows) and not config.sliding_causal,
        "transformer_layer_config": _write_transformer(config),
    }
    if config.num_target_layers is not None:
        out["num_target_layers"] = config.num_target_layers
    if config.quantization_config is not None:
        out["quantization_config"] = dict(config.quantization_config)
    return out


def _write_transformer(config: DrafterConfig) -> dict[str, Any]:
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


def _draft_vocab(raw: Mapping[str, Any], layers: Mapping[str, Any]) -> int | None:
    if raw.get("draft_vocab_size") is None:
        return None
    size = fields.positive_int(raw, "draft_vocab_size")
    return None if size == layers["vocab_size"] else size

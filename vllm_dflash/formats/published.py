"""The formats that kinds were published in, which share their keys.

pytest tests/unit/test_formats.py tests/unit/test_config.py
"""

from collections.abc import Mapping
from typing import Any

from vllm_dflash import fields, kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats.angelspec import (
    ANGELSPEC,
    OWN_KEYS,
    as_published,
    is_angelspec,
    kind_in,
    written,
)
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
from vllm_dflash.formats.speculators import SPECULATORS
from vllm_dflash.formats.unread import check_dflash_config, check_head, check_keys
from vllm_dflash.pairing import default_target_layer_ids


def parse_published(raw: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that such a ``config.json`` describes; see ``formats.parse``."""
    kind, flat_keys = kinds.architectures()[_architecture(raw)], frozenset[str]()
    format = kind.format
    if is_angelspec(raw):
        kind, format, flat_keys = kind_in(raw, kind), ANGELSPEC, OWN_KEYS
        raw = as_published(raw, kind)
    is_flat = kind.is_flat or format == ANGELSPEC
    nested, place = raw.get("dflash_config"), "dflash_config."
    if is_flat and nested is None:
        nested, place = raw, ""
    if not isinstance(nested, Mapping):
        raise fields.bad(
            "dflash_config",
            "is missing" if nested is None else f"is {fields.shown(nested)}",
            f"it holds mask_token_id and target_layer_ids. {fields.CAME_WITH}",
        )
    if nested is not raw:
        check_dflash_config(nested, kind, keys_of(kind))
    check_head(kind, raw, raw if is_flat else nested)
    known = {EMBEDDING_SCALE}
    # What the file says twice, alike.
    known |= {name for name in keys_of(kind) if name in nested and raw.get(name) == nested[name]}
    if is_flat:
        known |= {*keys_of(kind), "target_layer_ids", "causal", *flat_keys}
    depth = fields.optional_positive_int(raw, "num_target_layers")
    transformer = read_layers(raw)
    if nested.get("target_layer_ids") is None:
        raise _no_layers(depth, transformer["num_hidden_layers"])
    # Newer checkpoints hold the block size beside the mask token.
    for holder, name in ((raw, "block_size"), (nested, f"{place}block_size")):
        fields.optional_positive_int(holder, name)
    block_size = fields.positive_int(
        raw if raw.get("block_size") is not None else {"block_size": nested.get("block_size")},
        "block_size",
    )
    twice = ("block_size", "mask_token_id", *(("target_layer_ids",) if is_flat else ()))
    for name in twice:
        fields.agree(name, raw.get(name), f"dflash_config.{name}", nested.get(name))
    windows, causal = read_attention(raw, raw, nested)
    return DrafterConfig(
        **transformer,
        block_size=block_size,
        mask_token_id=fields.token_id(nested, f"{place}mask_token_id"),
        target_layer_ids=fields.layer_ids(nested["target_layer_ids"], f"{place}target_layer_ids"),
        num_target_layers=depth,
        draft_vocab_size=draft_vocab(raw, raw),
        sliding_windows=windows,
        sliding_causal=causal,
        quantization_config=fields.quantization(raw),
        dtype=fields.dtype(raw),
        head=read_head(kind, raw) if is_flat else read_head(kind, nested, place),
        **read_convolution(kind, nested, "dflash_config."),
        kind=kind.name,
        unknown_keys=tuple(sorted(check_keys(raw, kind, by_transformers=True, known=known))),
        **read_scales(raw, nested, place),
        input_embedding_scale=read_embedding_scale(raw, nested, place),
        format=format,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    """The one architecture that the file gives, by its published name or vLLM's."""
    given = raw.get("architectures")
    known = (
        [name for name in kinds.architectures() if name in given] if fields.is_list(given) else []
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


def write_published(config: DrafterConfig, format: str) -> dict[str, Any]:
    """The contents of ``config.json`` in ``format``; raises as ``formats.write``."""
    kind = kinds.kind_of(config)
    if kind.format != format:
        raise DrafterConfigError(
            f"{format} holds no {kind.name} drafter", f"write it as {kind.format} or {SPECULATORS}"
        )
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        **config.head,
        **write_convolution(config),
        **write_embedding_scale(config),
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
        **(nested if kind.is_flat else {"dflash_config": nested}),
    }
    if kind.first_row == 0:
        out["sample_from_anchor"] = True
    out |= write_layers(config) | write_scales(config)
    if config.num_target_layers is not None:
        out["num_target_layers"] = config.num_target_layers
    if config.draft_vocab_size is not None:
        out["draft_vocab_size"] = config.draft_vocab_size
    if config.quantization_config is not None:
        out["quantization_config"] = dict(config.quantization_config)
    return written(config, out) if format == ANGELSPEC else dict(sorted(out.items()))

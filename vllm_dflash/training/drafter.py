"""What drafter is trained for a target, from settings or from a drafter to go on from; and its
first weights.

pytest tests/unit/test_train_drafter.py
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_dflash import kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.pairing import default_target_layer_ids
from vllm_dflash.records import object_of
from vllm_dflash.reference.checkpoint import load_drafter, new_drafter
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.target import Target
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING_FILE

_RESERVED = re.compile(r"reserved|unused|mask", re.IGNORECASE)
_START = 2.0
"""Nats above ln V that the mask's embedding may cost at first: less takes longer to grow
back than it saves, more has to be unlearned (docs/log.md)."""


def plan(settings: Settings, target: Target) -> tuple[DrafterConfig, str]:
    """The drafter's configuration, and how its mask token was chosen.

    Raises:
        TrainingError: a setting does not fit the target, or no token can be the mask.
    """
    table = settings.drafter
    try:
        if table.init is not None:
            return _continued(settings, target)
        mask, why = mask_token(target, table.mask_token_id, bool(table.mask_embedding))
        config = _new(settings, target, mask)
        config.check()
    except DrafterConfigError as error:
        raise TrainingError(str(error)) from None
    return config, why


def decide_mask(settings: Settings, target: Target) -> Settings:
    """The settings, with ``mask_embedding`` decided: trained where no token is free, or where what
    is begun from has one.

    Raises:
        TrainingError: it is set to false, and the drafter that is begun from has one.
    """
    table = settings.drafter
    begun = [
        folder
        for folder in (table.init, table.init_layers)
        if folder and (Path(folder) / MASK_EMBEDDING_FILE).is_file()
    ]
    if table.mask_embedding is False and begun:
        raise TrainingError(
            f"mask_embedding is set to false, but {begun[0]} was trained with one of its own: leave"
            " the setting out"
        )
    own = table.mask_embedding
    if own is None:
        own = bool(begun) or (
            table.init is None
            and table.mask_token_id is None
            and target.tokenizer is not None
            and _free_token(target) is None
        )
    return replace(settings, drafter=replace(table, mask_embedding=own))


def mask_token(target: Target, given: int | None, own_embedding: bool = False) -> tuple[int, str]:
    """A token that fills the places to draft: given, the tokenizer's own, or one that text never
    holds; and which of them.

    Where none is free the end token's id stands for the mask, whose embedding is the drafter's own
    (``decide_mask``).
    """
    own = "; its embedding is the drafter's own (mask_embedding.pt)" if own_embedding else ""
    if given is not None:
        return given, f"as set{own}"
    if target.tokenizer is None:
        raise TrainingError(
            "the target has no tokenizer: give --mask-token-id, an id below"
            f" {target.shape.vocab_size} that its text never holds"
        )
    free = _free_token(target)
    if free is not None:
        return free[0], free[1] + own
    end = target.eos_token_id if target.eos_token_id is not None else target.tokenizer.eos_token_id
    if end is None or not own_embedding:
        remedy = (
            "set mask_embedding"
            if end is not None
            else "give --mask-token-id, the id of a token that text never holds"
        )
        raise TrainingError(
            f"the tokenizer has no mask, reserved or padding token, and no row is free: {remedy}"
        )
    return end, f"the end token, for none is free{own}"


def _free_token(target: Target) -> tuple[int, str] | None:
    """A token that text never holds, and which; the embedding's rows past the tokenizer are what
    z-lab's drafters for Qwen3 take."""
    tokenizer, rows = target.tokenizer, target.shape.vocab_size
    if getattr(tokenizer, "mask_token_id", None) is not None:
        return tokenizer.mask_token_id, f"the tokenizer's mask token {tokenizer.mask_token}"
    if len(tokenizer) < rows:
        return (
            len(tokenizer),
            (
                f"the first of the embedding's {rows - len(tokenizer)} rows that the tokenizer does"
                " not use"
            ),
        )
    for token, index in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]):
        if _RESERVED.search(token) and index < rows:
            return index, f"the reserved token {token}"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token_id, f"the tokenizer's padding token {tokenizer.pad_token}"
    return None


def default_layers(kind: str, num_target_layers: int) -> int:
    """The papers' depth, or less for a shallow target: draft layers cost as much as the
    target's."""
    return max(1, kinds.every()[kind].layers(num_target_layers))


def default_features(kind: str, layers: int, num_target_layers: int) -> tuple[int, ...]:
    """Evenly spaced target layers, as many as the kind wants."""
    count = kinds.every()[kind].features(layers, num_target_layers)
    # No more than there are between the formula's first and last, so that none comes twice.
    return default_target_layer_ids(min(count, num_target_layers - 3), num_target_layers)


def first_weights(config: DrafterConfig, settings: Settings, model: Any) -> Drafter:
    """The drafter to begin with, in float32: ``init``'s weights, copies of target layers or of a
    drafter's, or random ones from the seed.

    Raises:
        TrainingError: those layers have another shape than the drafter's, or ``init`` or
            ``init_layers`` is unusable.
    """
    torch.manual_seed(settings.run.seed)
    drafter: Drafter = new_drafter(config).float()
    if settings.drafter.init is not None:
        try:
            loaded = load_drafter(settings.drafter.init, torch.float32)
        except DrafterConfigError as error:
            raise TrainingError(f"init: {error}") from None
        if loaded.own.embed_tokens is not None or (loaded.own.lm_head is None) != (
            loaded.own.d2t is None
        ):
            raise TrainingError(
                f"the drafter of init, {settings.drafter.init}, has an embedding or lm_head of its"
                " own, which is not trained here: begin with its layers by init_layers, or give a"
                " drafter without"
            )
        drafter.own = loaded.own
        drafter.mask_embedding = loaded.mask_embedding
        drafter.load_state_dict(loaded.state_dict())
    else:
        with torch.no_grad():
            # lm_head was trained behind this norm.
            drafter.norm.weight.copy_(model.model.norm.weight)
            if not (settings.drafter.init_from_target or settings.drafter.init_layers):
                drafter.norm.weight.mul_(_start_scale(config, model))
        if settings.drafter.init_from_target:
            _copy_layers(drafter, model)
        if settings.drafter.init_layers is not None:
            _take_layers(drafter, settings.drafter.init_layers)
    if settings.drafter.mask_embedding and drafter.mask_embedding is None:
        # As the target's embeddings are: the first step begins with an input that it knows.
        drafter.mask_embedding = nn.Parameter(_mask_row(config, model).cpu().clone())
    if settings.drafter.tie_context:
        for layer in drafter.layers:
            for name, block_own in kinds.kind_of(config).context.own_projections.items():
                setattr(layer.self_attn, name, getattr(layer.self_attn, block_own))
    return drafter


def _mask_row(config: DrafterConfig, model: Any) -> torch.Tensor:
    """The target's embedding of the mask, [H] float32, with the factor that it may end in; its bare
    row where the drafter has a factor of its own for rows, and so for a mask embedding."""
    embedding = model.get_input_embeddings()
    if kinds.row_scale(config) is not None:
        return embedding.weight[config.mask_token_id].detach().float()
    ids = torch.tensor([config.mask_token_id], device=embedding.weight.device)
    return embedding(ids)[0].detach().float()


def _start_scale(config: DrafterConfig, model: Any) -> float:
    """What the final norm is scaled by, so that the first loss is near ln V.

    Random layers add little to the embedding of the mask, which by itself, behind a norm as the
    target has it, asks for the mask's own token: the first loss was several times ln V, and the
    first steps went into unlearning that (docs/log.md). The factor leaves the mask's embedding a
    loss of at most ``_START`` above ln V against any token.
    """
    row = _mask_row(config, model)
    row = row * torch.rsqrt(row.square().mean() + config.rms_norm_eps)
    head = model.get_output_embeddings().weight.detach().float()
    logits = (head @ (row * model.model.norm.weight.detach().float())).double()
    logits -= logits.mean()
    low, high = 0.0, 1.0
    for _ in range(30):
        scale = (low + high) / 2
        excess = float((scale * logits).logsumexp(0)) - math.log(len(logits))
        low, high = (scale, high) if excess < _START else (low, scale)
    return high


def with_weights(config: DrafterConfig, weights: Mapping[str, torch.Tensor]) -> Drafter:
    """A drafter with these weights by parameter name; projections that were tied are tensors of
    their own in it, as on disk."""
    out = new_drafter(config)
    if "mask_embedding" in weights:
        out.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
    # A tied projection is named once, by its block's own.
    out.load_state_dict(
        {
            name: weights[name if name in weights else of_the_block(config, name)]
            for name in out.state_dict()
        }
    )
    return out


def of_the_block(config: DrafterConfig, name: str) -> str:
    """The block's own tensor that one of the context's own projections may be."""
    for own, block_own in kinds.kind_of(config).context.own_projections.items():
        name = name.replace(f".{own}.", f".{block_own}.")
    return name


def _copy_layers(drafter: Drafter, model: Any) -> None:
    """Draft layer d begins as the target layer at the same share of the depth; what only a drafter
    has stays random."""
    depth, count = len(model.model.layers), len(drafter.layers)
    for d, layer in enumerate(drafter.layers):
        source = model.model.layers[round(d * (depth - 1) / max(1, count - 1))].state_dict()
        own = layer.state_dict()
        wrong = sorted(
            name for name in own.keys() & source.keys() if own[name].shape != source[name].shape
        )
        if wrong or not any("mlp" in name for name in own.keys() & source.keys()):
            raise TrainingError(
                "init_from_target: the target's layers differ from the drafter's"
                f" ({', '.join(wrong) or 'no mlp'}): leave it out, or give the drafter the target's"
                " intermediate_size"
            )
        own |= {name: source[name].float() for name in own.keys() & source.keys()}
        for name, block_own in kinds.kind_of(drafter.config).context.own_projections.items():
            own[f"self_attn.{name}.weight"] = own[f"self_attn.{block_own}.weight"].clone()
        layer.load_state_dict(own)


def _take_layers(drafter: Drafter, folder: str) -> None:
    """The draft layers and last norm of another drafter; what it sees of the target stays random,
    where only one kind has it."""
    try:
        source = load_drafter(folder, torch.float32)
    except DrafterConfigError as error:
        raise TrainingError(f"init_layers: {error}") from None
    if source.mask_embedding is not None:
        drafter.mask_embedding = nn.Parameter(source.mask_embedding.detach().clone())
    found, own = source.state_dict(), drafter.state_dict()
    wanted = {
        name: name if name in found else of_the_block(drafter.config, name)
        for name in own
        if name.startswith(("layers.", "norm."))
    }
    wrong = sorted(
        name
        for name, taken in wanted.items()
        if taken not in found or found[taken].shape != own[name].shape
    )
    if (
        wrong
        or len(source.layers) != len(drafter.layers)
        or source.config.mask_token_id != drafter.config.mask_token_id
    ):
        raise TrainingError(
            f"init_layers: {folder} has {len(source.layers)} layers and mask token"
            f" {source.config.mask_token_id}, the drafter to train {len(drafter.layers)} and"
            f" {drafter.config.mask_token_id}; of another shape: {', '.join(wrong) or 'none'}. Give"
            " the settings that it has"
        )
    drafter.load_state_dict(own | {name: found[taken] for name, taken in wanted.items()})


def _new(settings: Settings, target: Target, mask: int) -> DrafterConfig:
    table, text, depth = settings.drafter, target.config, target.shape.num_hidden_layers
    layers = table.layers or default_layers(table.kind, depth)
    rope = dict(getattr(text, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", None)
    if theta is None:
        raise TrainingError(
            "the target's config gives no single rope_theta, so the drafter's positions are"
            " unknown: train from --init"
        )
    heads = text.num_attention_heads
    return DrafterConfig(
        hidden_size=text.hidden_size,
        intermediate_size=table.intermediate_size or text.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        block_size=table.block_size,
        mask_token_id=mask,
        target_layer_ids=table.target_layer_ids or default_features(table.kind, layers, depth),
        num_target_layers=depth,
        max_position_embeddings=table.max_position_embeddings or text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(theta),
        rope_scaling=None if rope.get("rope_type", "default") == "default" else rope,
        dtype=(
            target.dtype if settings.export.export_dtype == "auto" else settings.export.export_dtype
        ),
        kind=table.kind,
        head=_head_settings(table.head_settings),
        conv_kernel_size=table.conv_kernel_size,
        conv_group_size=table.conv_group_size if table.conv_kernel_size else 0,
        draft_vocab_size=table.draft_vocab_size,
    )


def _head_settings(given: str) -> dict[str, Any]:
    try:
        return object_of(given)
    except ValueError:
        raise TrainingError(
            f'head_settings is {given!r}: give a JSON object such as {{"selector_rank": 64}}'
        ) from None


def _continued(settings: Settings, target: Target) -> tuple[DrafterConfig, str]:
    """``init``'s configuration; only its reach may change."""
    from vllm_dflash.pairing import check_pair

    table = settings.drafter
    config = DrafterConfig.from_pretrained(Path(table.init or ""))
    for name, wanted in (
        ("layers", config.num_hidden_layers),
        ("target_layer_ids", config.target_layer_ids),
        ("mask_token_id", config.mask_token_id),
        ("intermediate_size", config.intermediate_size),
        ("draft_vocab_size", config.draft_vocab_size),
    ):
        given = getattr(table, name)
        if given not in (None, wanted):
            raise TrainingError(
                f"{name} is {given}, but the drafter of init has {wanted}: leave {name} out, or"
                " train without init"
            )
    if config.kind != table.kind:
        raise TrainingError(f"the drafter of init is a {config.kind}: set kind to it")
    reach = table.max_position_embeddings or config.max_position_embeddings
    config = config.with_(block_size=table.block_size, max_position_embeddings=reach)
    check_pair(config, target.shape, config.max_speculative_tokens, 1)
    return config, f"that of {table.init}"

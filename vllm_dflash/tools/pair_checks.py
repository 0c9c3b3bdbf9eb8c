"""What can be said of a target and a drafter without running them: one ``Check`` a question, each
with its remedy.

pytest tests/engine/test_doctor.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dflash import smollm2
from vllm_dflash.checks import check_model_type
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import CONFIG_FILE, read_raw
from vllm_dflash.hub import are_equal, load_tokenizer, resolved_dtype
from vllm_dflash.kinds import row_scale
from vllm_dflash.pairing import TargetShape, check_pair, embedding_scale
from vllm_dflash.plugin import why_off
from vllm_dflash.records import RecordError, read
from vllm_dflash.tools.inspect import Inspection

_TRAINING = {"settings": {"run": {"target": str}}}
"""What ``train`` leaves beside a drafter, as far as it is read here."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Check:
    """One question's answer; ``state`` is ok, warning or error, and ``remedy`` says what to
    change."""

    name: str
    state: str
    found: str
    remedy: str = ""


def refusal(name: str, error: DrafterConfigError) -> Check:
    """What the package refuses, as a check."""
    return Check(
        name,
        "error",
        f"{error.where}: {error.problem}" if error.where else error.problem,
        error.remedy,
    )


@dataclass(frozen=True)
class Settings:
    """What the pair is to be served with; ``None``: as the checkpoints have it."""

    num_speculative_tokens: int | None = None
    max_model_len: int | None = None
    dtype: str = "auto"


def checkpoint_checks(found: Inspection) -> list[Check]:
    """The drafter's own folder."""
    if found.errors:
        return [refusal("checkpoint", error) for error in found.errors]
    if found.config is not None:
        try:
            check_model_type(read_raw(found.folder), found.config, found.folder)
        except DrafterConfigError as error:
            return [refusal("model type", error)]
    warnings = [
        Check("config keys", "warning", warning, "compare them with the drafter's model card")
        if warning.startswith(CONFIG_FILE)
        else Check("weights", "warning", warning)
        for warning in found.warnings
    ]
    return [
        *warnings,
        Check(
            "checkpoint",
            "ok",
            f"{found.config.format if found.config else ''}, {len(found.drafter_tensors)} tensors,"
            " all finite",
        ),
    ]


def shape_checks(
    drafter: DrafterConfig, target: Any, settings: Settings, num_tokens: int | None = None
) -> list[Check]:
    """Everything that vLLM's start would refuse, each on its own.

    Args:
        target: a Hugging Face config.
        num_tokens: how many tokens the target's tokenizer has, where that is known.
    """
    shape, text = TargetShape.from_hf(target, num_tokens), target.get_text_config()
    same = TargetShape(
        drafter.hidden_size,
        drafter.num_target_layers or shape.num_hidden_layers,
        drafter.vocab_size,
    )
    anywhere = replace(drafter, num_target_layers=None)
    k = settings.num_speculative_tokens or drafter.max_speculative_tokens
    theirs = getattr(text, "max_position_embeddings", None) or drafter.max_position_embeddings
    length = settings.max_model_len or theirs
    ids = ", ".join(map(str, drafter.target_layer_ids))

    def has_the_layers() -> None:
        for config in (drafter, anywhere):
            check_pair(config, replace(same, num_hidden_layers=shape.num_hidden_layers), 1, 1)

    return [
        _asked(
            "hidden size",
            f"{shape.hidden_size} in both",
            lambda: check_pair(drafter, replace(same, hidden_size=shape.hidden_size), 1, 1),
        ),
        _asked(
            "vocabulary",
            _vocabularies(drafter, shape),
            lambda: check_pair(
                drafter, replace(same, vocab_size=shape.vocab_size, num_tokens=num_tokens), 1, 1
            ),
        ),
        _asked(
            "target layers", f"{ids} of {shape.num_hidden_layers}, counted from 0", has_the_layers
        ),
        _asked(
            "drafted tokens",
            f"num_speculative_tokens {k} of at most {drafter.max_speculative_tokens}",
            lambda: check_pair(drafter, same, k, 1),
        ),
        _asked(
            "context length",
            f"{length} tokens; drafter to {drafter.max_position_embeddings}, target to {theirs}",
            lambda: check_pair(drafter, same, 1, length),
        ),
        _longer_than_target(length, theirs),
        _rope(drafter, text),
        *_embedding(drafter, text),
        _dtype(drafter, text, settings.dtype),
    ]


def _vocabularies(drafter: DrafterConfig, shape: TargetShape) -> str:
    if drafter.vocab_size == shape.vocab_size:
        return f"{shape.vocab_size} tokens in both"
    return (
        f"{drafter.vocab_size} tokens; the target's {shape.vocab_size} rows end in padding, its"
        f" tokenizer has {shape.num_tokens}"
    )


def _asked(name: str, found: str, question: Callable[[], object]) -> Check:
    try:
        question()
    except DrafterConfigError as error:
        return refusal(name, error)
    return Check(name, "ok", found)


def _longer_than_target(length: int, theirs: int) -> Check:
    if length > theirs:
        return Check(
            "target's context",
            "error",
            f"max_model_len {length} is more than the target's {theirs}",
            f"--max-model-len {theirs} or less",
        )
    return Check("target's context", "ok", f"{length} of {theirs} tokens")


def _rope(drafter: DrafterConfig, text: Any) -> Check:
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(text, "rope_theta", None))
    kind, ours = (
        parameters.get("rope_type", "default"),
        (drafter.rope_scaling or {}).get("rope_type", "default"),
    )
    if theta is None:
        return Check(
            "rotary",
            "ok",
            f"theta {drafter.rope_theta:g}, {ours}; the target's config gives no single one",
        )
    if theta == drafter.rope_theta and kind == ours:
        return Check("rotary", "ok", f"theta {theta:g}, {kind} in both")
    return Check(
        "rotary",
        "warning",
        f"theta {drafter.rope_theta:g} ({ours}) in the drafter, {theta:g} ({kind}) in the target",
        "legal where it was trained so; where tau is low, compare with the drafter's model card",
    )


def _embedding(drafter: DrafterConfig, text: Any) -> list[Check]:
    """Where the target's embedding ends in a factor: what the drafter's rows are multiplied by."""
    theirs, ours = embedding_scale(text), row_scale(drafter)
    if theirs == 1.0:
        return []
    if ours is not None:
        return [Check("embedding", "ok", f"rows times {ours:g}; the target's times {theirs:g}")]
    return [
        Check(
            "embedding",
            "warning",
            f"rows times the target's {theirs:g}: config.json does not say",
            "where tau is low, it was trained on bare rows: give input_embedding_scale 1",
        )
    ]


def _dtype(drafter: DrafterConfig, text: Any, asked: str) -> Check:
    served, stored = resolved_dtype(text, asked), drafter.dtype
    if served == "float16" and stored != "float16":
        return Check(
            "dtype",
            "warning",
            f"stored as {stored}, run in float16, whose range is smaller",
            "serve with --dtype bfloat16",
        )
    return Check("dtype", "ok", f"stored as {stored}, run in {served}")


def tokenizer_checks(drafter: DrafterConfig, folder: Path, tokenizer: Any) -> list[Check]:
    """The target's tokenizer (or None) against the drafter folder's, and the mask token's place in
    it."""
    if tokenizer is None:
        return [
            Check(
                "tokenizer",
                "warning",
                "the target has none that can be loaded",
                "give --prompts with prompt_token_ids",
            )
        ]
    return [_same_tokenizer(folder, tokenizer), _mask_token(drafter.mask_token_id, tokenizer)]


def _same_tokenizer(folder: Path, tokenizer: Any) -> Check:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return Check(
            "tokenizer", "ok", f"the target's, {len(tokenizer)} tokens; the drafter brings none"
        )
    own = load_tokenizer(folder)
    if own is None:
        return Check(
            "tokenizer",
            "warning",
            "the drafter's cannot be loaded",
            "remove it: serving uses the target's",
        )
    if are_equal(own, tokenizer):
        return Check("tokenizer", "ok", f"equal, {len(tokenizer)} tokens")
    ours, theirs = own.get_vocab(), tokenizer.get_vocab()
    different = [token for token, i in ours.items() if theirs.get(token) != i] + [
        token for token in theirs if token not in ours
    ]
    found = f"the drafter's is another one: {len(different)} tokens differ" + (
        f", such as {different[0]!r}" if different else ""
    )
    return Check(
        "tokenizer", "error", found, "serve the drafter with the target that its model card names"
    )


def _mask_token(mask: int, tokenizer: Any) -> Check:
    if mask >= len(tokenizer):
        return Check("mask token", "ok", f"{mask}, a row of the embedding that no text reaches")
    name = tokenizer.convert_ids_to_tokens(mask)
    special = mask in tokenizer.all_special_ids or mask in getattr(
        tokenizer, "added_tokens_decoder", {}
    )
    if special:
        return Check("mask token", "ok", f"{mask}, {name!r}, which ordinary text does not yield")
    if mask in tokenizer(tokenizer.decode([mask]), add_special_tokens=False)["input_ids"]:
        return Check(
            "mask token",
            "warning",
            f"{mask} is {name!r}, which ordinary text yields: the drafter takes it there for a"
            " token to be drafted",
            "compare mask_token_id with the drafter's model card",
        )
    return Check("mask token", "ok", f"{mask}, {name!r}")


def training_checks(folder: Path, target: str) -> list[Check]:
    """Whether a drafter that was trained with ``smollm2`` is to serve it; none for another one, for
    a folder's path says nothing about its weights.

    Args:
        target: its folder or hub id, never the name.
    """
    try:
        trained = read(folder / "training.json", _TRAINING)
    except RecordError:  # another program's
        return []
    if trained is None or trained["settings"]["run"]["target"] != smollm2.NAME:
        return []
    name = smollm2.exact(smollm2.NAME)
    if smollm2.name_of(target) == name:
        return [Check("trained with", "ok", name)]
    return [
        Check(
            "trained with",
            "warning",
            f"{name}, whose weights are not those of {target}, nor is its text",
            f"serve it with --target {smollm2.NAME}; the tau below says what is left with this one",
        )
    ]


def plugin_check() -> Check:
    """Whether vLLM would draft with this package at all."""
    reason = why_off()
    if reason is not None:
        return Check(
            "plug-in",
            "error",
            reason,
            "unset the variable, or install the package where vLLM is; `vllm-dflash status` says"
            " more",
        )
    return Check("plug-in", "ok", "on")

"""Checkpoint formats: every known ``config.json`` to one ``DrafterConfig`` and back; the one map of
tensor names.

A kind's published format is told by ``architectures``, that of the speculators library, which holds
all kinds, by ``speculators_model_type``; ``vllm_dflash.kinds`` has the names.

Pure Python. A field that would change what the drafter computes and is not known here is refused:
ignored, it would only show as low acceptance. Tests: ``pytest tests/unit/test_formats.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dflash import fields, kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats.published import parse_published, write_published
from vllm_dflash.formats.speculators import SPECULATORS, parse_speculators, write_speculators
from vllm_dflash.json_text import RepeatedKeyError, loads
from vllm_dflash.regular import read_regular

CONFIG_FILE = "config.json"
_LARGEST_CONFIG = 1 << 24
METHOD = "dflash"
"""vLLM's name of the method of speculation that its drafters and ours come under."""

IGNORED_TENSORS = frozenset(
    {"t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq"}
)
"""Tensors that only training needs."""
_TENSOR_ALIASES = {
    "draft_id_to_target_id": "d2t",
    "context_proj.weight": "fc.weight",
    "context_norm.weight": "hidden_norm.weight",
    "final_norm.weight": "norm.weight",
}


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
    for part, renamed in kinds.renamed_parts():
        if name.startswith(part):
            for theirs, ours in renamed:
                name = name.replace(theirs, ours)
    return _TENSOR_ALIASES.get(name, name)


def is_ours(speculative: Any) -> bool:
    """Whether a vLLM ``SpeculativeConfig``, or None, is for a drafter that this package serves."""
    if speculative is None or speculative.method != METHOD:
        return False
    # Of a file that nothing has judged yet: it may hold anything.
    return kind_named({"architectures": speculative.draft_model_config.architectures}) is not None


def kind_named(raw: Any) -> kinds.Kind | None:
    """The kind that the contents of a ``config.json`` name, sound or not; None where they name none
    of ours, or several."""
    if not isinstance(raw, Mapping):
        return None
    kind, architectures = raw.get("speculators_model_type"), raw.get("architectures")
    if kind is not None:
        return kinds.every().get(kind) if isinstance(kind, str) else None
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    name = architectures[0]
    return kinds.architectures().get(name) if isinstance(name, str) else None


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
    """The contents of ``folder/config.json``, sound or not; of a key that a foreign drafter gives
    twice the last value, which vLLM takes.

    Raises:
        DrafterConfigError: the file is absent, no regular file, too large, no JSON, or gives a key
            twice.
    """
    path = Path(folder) / CONFIG_FILE
    data = read_regular(path, _LARGEST_CONFIG)
    if data is None:
        raise DrafterConfigError(
            f"{path} does not exist",
            "point at a folder that holds a drafter's config.json and safetensors",
        )
    try:
        return loads(data.decode())
    except RepeatedKeyError as error:
        if is_foreign(error.value):
            return error.value
        raise DrafterConfigError(
            f"{path} gives the key {fields.shown(error.key)} twice, and nothing says which of its"
            " two values the drafter was trained with",
            f"give it once. {fields.CAME_WITH}",
            field=error.key,
        ) from None
    except ValueError as error:
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
            f"it holds {fields.json_type(raw)}, not an object of settings",
            "use the config.json that the checkpoint came with",
        )
    config = parse_speculators(raw) if "speculators_model_type" in raw else parse_published(raw)
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
        write_speculators(config, verifier)
        if format == SPECULATORS
        else write_published(config, format)
    )

"""What a drafter checkpoint is: one validated form of its ``config.json``, and the only home of its defaults.

Pure Python: no torch and no vLLM import, so that every tool can check a checkpoint before anything is loaded.
Limits: reads z-lab's DFlash format (``DFlashDraftModel``); full attention in every layer, one rotary base.

    pytest tests/unit/test_config.py
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

ARCHITECTURE = "DFlashDraftModel"
"""The architecture name in z-lab's checkpoints, and the one that vLLM looks up."""

_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "block_size", "max_position_embeddings",
)  # fmt: skip
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 1_000_000.0


class DrafterConfigError(ValueError):
    """A drafter's configuration is unusable; the message names the field and the remedy."""


def default_target_layer_ids(num_draft_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """The target layers whose outputs condition the drafter: ``round(1 + i (L - 4) / (D - 1))``, i = 0..D-1.

    Zero-based layer i is Hugging Face's ``hidden_states[i + 1]``. Source: arXiv 2602.06036 and the released
    checkpoints (D = 5, L = 36 gives 1, 9, 17, 25, 33).
    """
    if num_target_layers < 4:
        raise DrafterConfigError(f"the target has {num_target_layers} layers, the default needs at least 4: give target_layer_ids")
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    step = (num_target_layers - 4) / (num_draft_layers - 1)
    return tuple(round(1 + i * step) for i in range(num_draft_layers))


@dataclass(frozen=True)
class TargetShape:
    """What of a target a drafter depends on."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    @classmethod
    def from_hf(cls, config: Any) -> "TargetShape":
        """Reads a Hugging Face config object (its text part, where it has several)."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return cls(text.hidden_size, text.num_hidden_layers, text.vocab_size)


@dataclass(frozen=True)
class DrafterConfig:
    """A DFlash drafter's shape and its ties to the target. Sizes are in elements, positions in tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    max_position_embeddings: int
    rms_norm_eps: float = _DEFAULT_RMS_NORM_EPS
    rope_theta: float = _DEFAULT_ROPE_THETA
    dtype: str = "bfloat16"

    @property
    def max_speculative_tokens(self) -> int:
        """The most tokens one draft can hold: the block less its anchor, ``block_size - 1``."""
        return self.block_size - 1

    @property
    def num_features(self) -> int:
        """T, the number of captured target layers."""
        return len(self.target_layer_ids)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DrafterConfig":
        """Parses and checks the contents of a ``config.json``.

        Raises:
            DrafterConfigError: a field is missing, of the wrong type, out of range or of a kind not supported.
        """
        architectures = raw.get("architectures") or []
        if ARCHITECTURE not in architectures:
            raise DrafterConfigError(
                f"architectures is {list(architectures)}, not ['{ARCHITECTURE}']: this is no DFlash drafter. "
                "Point 'model' in the speculative config at the drafter's folder"
            )
        for name in _REQUIRED:
            _positive_int(raw, name)
        nested = raw.get("dflash_config")
        if not isinstance(nested, Mapping):
            raise DrafterConfigError(
                "dflash_config is missing: it holds mask_token_id and target_layer_ids. Use the config.json that the checkpoint came with; "
                "VLLM_DFLASH=0 serves drafters of other formats (speculators) with vLLM's own dflash"
            )
        _refuse_unsupported(raw, nested)
        mask_token_id, layer_ids = nested.get("mask_token_id"), nested.get("target_layer_ids")
        if not _is_int(mask_token_id):
            raise DrafterConfigError(
                f"dflash_config.mask_token_id is {mask_token_id!r}: give the token id that the drafter was trained with"
            )
        num_target_layers = _positive_int(raw, "num_target_layers")
        if layer_ids is None:
            layer_ids = default_target_layer_ids(raw["num_hidden_layers"], num_target_layers)
        if not isinstance(layer_ids, Sequence) or isinstance(layer_ids, str) or not layer_ids or not all(map(_is_int, layer_ids)):
            raise DrafterConfigError(f"dflash_config.target_layer_ids is {layer_ids!r}: give a list of zero-based target layers")
        config = cls(
            **{name: raw[name] for name in _REQUIRED},
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(layer_ids),
            num_target_layers=num_target_layers,
            rms_norm_eps=float(raw.get("rms_norm_eps") or _DEFAULT_RMS_NORM_EPS),
            rope_theta=_rope_theta(raw),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        )
        config._check()
        return config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DrafterConfig":
        """Reads ``folder/config.json``; errors name the file."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise DrafterConfigError(f"{path} does not exist: point at a folder that holds a drafter's config.json and safetensors")
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise DrafterConfigError(f"{path} is not JSON ({error}): fetch the checkpoint again") from None
        try:
            return cls.from_dict(raw)
        except DrafterConfigError as error:
            raise DrafterConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of z-lab's ``config.json`` for this drafter; ``from_dict`` reads it back unchanged."""
        return {
            "architectures": [ARCHITECTURE],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)},
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    def with_(self, **changes: Any) -> "DrafterConfig":
        """A checked copy with some fields changed."""
        config = replace(self, **changes)
        config._check()
        return config

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise DrafterConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}: fix config.json"
            )
        if self.block_size < 2:
            raise DrafterConfigError(
                f"block_size is {self.block_size}: a block holds an anchor and at least one drafted token, so at least 2"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DrafterConfigError(
                f"dflash_config.mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size} tokens: "
                "use the id that the drafter was trained with"
            )
        bad = [i for i in self.target_layer_ids if not 0 <= i < self.num_target_layers]
        if bad:
            raise DrafterConfigError(
                f"dflash_config.target_layer_ids {bad} are outside the target's {self.num_target_layers} layers (0 to {self.num_target_layers - 1}): "
                "the drafter was trained for a deeper target, or the ids are one-based"
            )
        if len(set(self.target_layer_ids)) != len(self.target_layer_ids):
            raise DrafterConfigError(f"dflash_config.target_layer_ids {list(self.target_layer_ids)} names a layer twice: each layer once")


def check_pair(drafter: DrafterConfig, target: TargetShape, num_speculative_tokens: int, max_model_len: int) -> None:
    """Refuses a drafter that cannot serve this target with these settings.

    Raises:
        DrafterConfigError: the first mismatch, with its remedy.
    """
    wrong = "this drafter was trained for another target; serve it with the target that its model card names"
    for what, theirs, ours in (
        ("hidden_size", target.hidden_size, drafter.hidden_size),
        ("vocab_size", target.vocab_size, drafter.vocab_size),
        ("number of layers (num_target_layers)", target.num_hidden_layers, drafter.num_target_layers),
    ):
        if theirs != ours:
            raise DrafterConfigError(f"the target's {what} is {theirs}, the drafter's is {ours}: {wrong}")
    if not 1 <= num_speculative_tokens <= drafter.max_speculative_tokens:
        raise DrafterConfigError(
            f"num_speculative_tokens is {num_speculative_tokens}: this drafter's blocks of {drafter.block_size} hold 1 to "
            f"{drafter.max_speculative_tokens} drafted tokens. Set num_speculative_tokens to {drafter.max_speculative_tokens} or less"
        )
    if max_model_len > drafter.max_position_embeddings:
        raise DrafterConfigError(
            f"max_model_len is {max_model_len}, but the drafter's rotary positions end at max_position_embeddings = "
            f"{drafter.max_position_embeddings}: start vLLM with --max-model-len {drafter.max_position_embeddings} or less"
        )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not _is_int(value) or value <= 0:
        state = "missing" if value is None else f"{value!r}"
        raise DrafterConfigError(
            f"{name} is {state}: config.json must give a positive whole number. Use the file that the checkpoint came with"
        )
    return value


def _rope_theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or {}
    return float(raw.get("rope_theta") or parameters.get("rope_theta") or _DEFAULT_ROPE_THETA)


def _refuse_unsupported(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> None:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {
        "rope_scaling": kind if kind != "default" else None,
        "layer_types": [t for t in raw.get("layer_types") or [] if t != "full_attention"],
        "attention_bias": raw.get("attention_bias"),
        "hidden_act": raw.get("hidden_act") if raw.get("hidden_act", "silu") != "silu" else None,
        "draft_vocab_size": raw.get("draft_vocab_size") if raw.get("draft_vocab_size") != raw.get("vocab_size") else None,
        "quantization_config": raw.get("quantization_config"),
        "dflash_config.causal": nested.get("causal"),
        "dflash_config.use_swa": nested.get("use_swa"),
        "dflash_config.sample_from_anchor": nested.get("sample_from_anchor"),
    }
    for name, value in found.items():
        if value:
            raise DrafterConfigError(
                f"{name} = {value!r} is not supported, and ignoring it would only show as low acceptance: "
                "use another checkpoint, or VLLM_DFLASH=0 to serve it with vLLM's own dflash"
            )

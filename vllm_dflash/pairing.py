"""What a drafter needs of its target: sizes, layers, and whether the two fit.

Pure Python: no torch and no vLLM import.

    pytest tests/unit/test_config.py
"""

import math
from dataclasses import dataclass
from typing import Any

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError


def default_target_layer_ids(num_draft_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """The target layers whose outputs condition the drafter: ``round(1 + i (L - 4) / (D - 1))``, i
    = 0..D-1.

    Zero-based layer i is Hugging Face's ``hidden_states[i + 1]``. Source: arXiv 2602.06036 and the
    released checkpoints (D = 5, L = 36 gives 1, 9, 17, 25, 33).
    """
    if num_target_layers < 4:
        raise DrafterConfigError(
            f"the target has {num_target_layers} layers, the rule needs at least 4",
            "give target_layer_ids",
            field="target_layer_ids",
        )
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
    """Rows of its embedding and lm_head."""
    num_tokens: int | None = None
    """How many of them its tokenizer can yield, those at the end being padding; None: not known."""

    @classmethod
    def from_hf(cls, config: Any, num_tokens: int | None = None) -> "TargetShape":
        """Reads a Hugging Face config object (its text part, where it has several).

        Raises:
            DrafterConfigError: names a size that it does not give, or that is none.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return cls(
            target_size(text, "hidden_size"),
            target_size(text, "num_hidden_layers"),
            target_size(text, "vocab_size"),
            num_tokens,
        )


def target_size(text: Any, name: str) -> int:
    """A positive whole number of a target's text config.

    Raises:
        DrafterConfigError: names it.
    """
    value = getattr(text, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise DrafterConfigError(
        f"the target's config gives no {name}"
        if value is None
        else f"the target's {name} is {value!r}, no positive whole number",
        "use the config.json that the target came with",
        field=name,
    )


def embedding_scale(text: Any) -> float:
    """The factor that is part of a target's embedding, of its text config: Gemma's ``sqrt(hidden
    size)``; 1 where there is none, or where it is not the embedding's but the model's.

    A drafter that shares the embedding is trained on what it gives. Source: transformers'
    ``ScaledWordEmbedding``, vllm-project/vllm#41703.
    """
    kind = getattr(text, "model_type", None)
    if isinstance(kind, str) and kind.startswith("gemma"):
        return math.sqrt(target_size(text, "hidden_size"))
    return 1.0


def check_pair(
    drafter: DrafterConfig, target: TargetShape, num_speculative_tokens: int, max_model_len: int
) -> None:
    """Refuses a drafter that cannot serve this target with these settings.

    Raises:
        DrafterConfigError: the first mismatch, with its remedy.
    """
    wrong = (
        "this drafter was trained for another target; serve it with the target that its model card"
        " names"
    )
    depth = drafter.num_target_layers
    for name, what, theirs, ours, fits in (
        (
            "hidden_size",
            "hidden_size",
            target.hidden_size,
            drafter.hidden_size,
            target.hidden_size == drafter.hidden_size,
        ),
        (
            "vocab_size",
            "vocab_size",
            target.vocab_size,
            drafter.vocab_size,
            vocabularies_fit(drafter, target),
        ),
        (
            "num_target_layers",
            "number of layers (num_target_layers)",
            target.num_hidden_layers,
            depth,
            depth in (None, target.num_hidden_layers),
        ),
    ):
        if not fits:
            raise DrafterConfigError(
                f"the target's {what} is {theirs}, the drafter's is {ours}", wrong, field=name
            )
    bad = [i for i in drafter.target_layer_ids if i >= target.num_hidden_layers]
    if bad:
        raise DrafterConfigError(
            f"target_layer_ids {bad} are outside the target's {target.num_hidden_layers} layers",
            wrong,
            field="target_layer_ids",
        )
    if not 1 <= num_speculative_tokens <= drafter.max_speculative_tokens:
        raise DrafterConfigError(
            f"num_speculative_tokens is {num_speculative_tokens}",
            f"this drafter's blocks of {drafter.block_size} hold 1 to"
            f" {drafter.max_speculative_tokens} drafted tokens. Set num_speculative_tokens to"
            f" {drafter.max_speculative_tokens} or less",
        )
    if max_model_len > drafter.max_position_embeddings:
        raise DrafterConfigError(
            f"max_model_len is {max_model_len}, but the drafter's rotary positions end at"
            f" max_position_embeddings = {drafter.max_position_embeddings}",
            f"start vLLM with --max-model-len {drafter.max_position_embeddings} or less",
            field="max_position_embeddings",
        )


def vocabularies_fit(drafter: DrafterConfig, target: TargetShape) -> bool:
    """Whether the drafter's vocabulary is the target's, or the target's without the rows that pad
    its embedding.

    A target's embedding is often longer than its tokenizer, rounded up for tensor parallelism; its
    drafter may have been trained without those rows (MiMo: 152,064 of 152,576).
    ``target.num_tokens`` says how many rows text can reach; a drafter that covers them all fits.
    Where it is not known, nothing but equality is sure.
    """
    if drafter.vocab_size == target.vocab_size:
        return True
    return (
        target.num_tokens is not None
        and target.num_tokens <= drafter.vocab_size < target.vocab_size
    )

"""One row of a batch run: what is asked, and what is written of the answer. Pure, but for vLLM's
own checks of the sampling parameters.

pytest tests/engine/test_cluster_batch.py
"""

from collections.abc import Mapping
from typing import Any

from vllm_dflash.prompts import PromptError, token_ids

SAMPLING = "sampling_params"
"""The field of a row with sampling parameters of its own; they win over the run's."""


def prompt_of(row: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """The row's prompt, messages or prompt_token_ids as token ids.

    Raises:
        PromptError: it has none of them, or one that cannot be used.
    """
    return token_ids(
        {name: value for name, value in row.items() if value is not None},
        "this row",
        tokenizer,
        vocab_size,
    )


def sampling_of(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The row's sampling parameters over the run's.

    Raises:
        PromptError: they are no object.
    """
    own = row.get(SAMPLING)
    if own is None:
        own = {}
    if not isinstance(own, Mapping):
        raise PromptError(f"{SAMPLING} is {own!r}: give an object such as {{'temperature': 0.7}}")
    # Parquet gives every row all the fields that any row has.
    return {**defaults, **{name: value for name, value in own.items() if value is not None}}


def answered(output: Any) -> dict[str, Any]:
    """What is written of a finished request: vLLM's ``RequestOutput``.

    ``drafts``, ``draft_tokens`` and ``accepted_tokens`` are None without a drafter, and where vLLM
    gives none: a request that ended at a stop string.
    """
    done = output.outputs[0]
    counts = {"drafts": None, "draft_tokens": None, "accepted_tokens": None}
    if done.spec_decode_metrics is not None:
        given = done.spec_decode_metrics.to_dict()
        counts = {
            "drafts": given["num_spec_steps"],
            "draft_tokens": given["num_draft_tokens"],
            "accepted_tokens": given["num_accepted_draft_tokens"],
        }
    return {
        "completion": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(done.token_ids),
        **counts,
        "error": None,
    }


def failed(error: str) -> dict[str, Any]:
    """What is written of a row that could not be answered."""
    return {
        "completion": None,
        "finish_reason": None,
        "prompt_tokens": None,
        "completion_tokens": None,
        "drafts": None,
        "draft_tokens": None,
        "accepted_tokens": None,
        "error": error,
    }

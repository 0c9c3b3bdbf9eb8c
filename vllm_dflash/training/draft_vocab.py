"""The draft vocabulary: which tokens a drafter ranks, and its own rows of the target's lm_head.

A small target's vocabulary is a large part of a draft's cost, and few of its tokens make up most of
what it says. Those that its answers hold most often are kept; what a draft cannot hold is decoded
as ever.

    vllm-dflash train ... --draft-vocab-size 16384
    pytest tests/unit/test_train_draft_vocab.py
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.drafter import OwnTables
from vllm_dflash.training.sequences import Sequences


def counts(data: Sequences, vocab_size: int, end: int | None = None) -> np.ndarray:
    """How often each of the target's tokens is in the answers, int64 [V]; prompts do not count, nor
    what comes after a token ``end``."""
    found = np.zeros(vocab_size, np.int64)
    for shard in data.shards:
        tokens = np.asarray(shard.tokens)
        places = np.arange(len(tokens)) - np.repeat(shard.starts[:-1], np.diff(shard.starts))
        answered = places >= np.repeat(shard.prompt_lengths, np.diff(shard.starts))
        if end is not None:
            ends = answered & (tokens == end)
            before = ends.cumsum() - ends
            answered &= before == np.repeat(before[shard.starts[:-1]], np.diff(shard.starts))
        found += np.bincount(tokens[answered], minlength=vocab_size)
    return found


def most_frequent(data: Sequences, size: int, vocab_size: int) -> Tensor:
    """The ``size`` tokens that the answers hold most often, ascending ids int64 [size]; of those
    that they hold as often the first, so that the choice is the same in every process."""
    order = np.argsort(-counts(data, vocab_size), kind="stable")[:size]
    return torch.from_numpy(np.sort(order))


def covered(data: Sequences, ids: Tensor, vocab_size: int, end: int | None = None) -> float:
    """The share of the answers' tokens, up to ``end``, that are among ``ids``."""
    found = counts(data, vocab_size, end)
    return float(found[ids.cpu().numpy()].sum() / max(1, found.sum()))


def own_tables(ids: Tensor, config: DrafterConfig, model: Any) -> OwnTables:
    """The target's rows for ``ids`` [draft vocabulary], frozen, rounded as they will be on disk."""
    head = model.get_output_embeddings().weight.detach()
    ids = ids.to(head.device)
    rows = head[ids].to(getattr(torch, config.dtype)).to(head.dtype)
    return OwnTables(lm_head=rows, d2t=ids - torch.arange(len(ids), device=head.device))


def rounded(own: OwnTables, config: DrafterConfig, dtype: torch.dtype) -> OwnTables:
    """The same in ``dtype``, by way of the one on disk."""
    if own.lm_head is None:
        return own
    return OwnTables(lm_head=own.lm_head.to(getattr(torch, config.dtype)).to(dtype), d2t=own.d2t)

"""Heads over the block: how the hidden states of a block become its tokens, one file or folder
each.

A head has ``Reference`` (plain PyTorch, trained and the oracle: ``heads/reference.py``) and
``Served`` (what vLLM's model runners call: ``models/parameters.py``); its record is a
``kinds.Head``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class Ranking(NamedTuple):
    """What a served head ranks with, on the device where it runs."""

    logits: Callable[["Tensor"], "Tensor"]
    """Hidden states [N, H] -> logits [N, V], of lm_head."""
    argmax: Callable[["Tensor"], "Tensor"]
    """Logits [N, V] float32 -> the first of the best tokens [N] int64."""
    best: Callable[["Tensor"], "Tensor"]
    """``argmax`` of ``logits``, hidden states [N, H] -> [N], as the device does it best."""
    confident: bool
    """Whether the probability of each token is wanted."""
    embed: "Callable[[Tensor], Tensor] | None" = None
    """Token ids [...] -> embeddings of them [..., H], the target's or the checkpoint's own."""
    before: "Tensor | None" = None
    """[B, C]: of each request the context, as ``ServedContext.combine`` makes it, of the token
    before its anchor; for a head ``over_block``."""


Ranked: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Draft tokens [B, K] int64, and the probability that the drafter gives each, [B, K] or None."""

Draft: TypeAlias = "Callable[[Tensor, Tensor, int, Ranking], Ranked]"
"""``ServedHead.draft``."""

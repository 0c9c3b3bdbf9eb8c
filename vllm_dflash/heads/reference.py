"""What heads are in plain PyTorch: what they rank, what they draft, and what they are taught.

pytest tests/unit/test_heads.py
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(NamedTuple):
    """What a head ranks, of the rows that predict; ``...`` is as a caller has it, mostly blocks x
    K."""

    hidden: Tensor
    """[..., H], after the final norm."""
    logits: Tensor
    """[..., V] float32, of lm_head."""
    embed: "Callable[[Tensor], Tensor] | None" = None
    """Token ids [...] -> embeddings of them [..., H], the target's or the checkpoint's own."""
    rank: "Callable[[Tensor], Tensor] | None" = None
    """Hidden states [..., H] -> logits [..., V] float32, as those of the rows were made."""
    before: Tensor | None = None
    """The context [..., C], one a block, of the token before its anchor; for a head
    ``over_block``."""

    def row(self, index: int) -> "Block":
        """One row [...] of blocks [..., K], for a head that goes from row to row."""
        return self._replace(hidden=self.hidden[..., index, :], logits=self.logits[..., index, :])


class Lesson(NamedTuple):
    """What training gets of a head for known tokens; all [..., K]."""

    losses: Tensor
    """Cross-entropies, float32, of which D-PACE takes its confidences."""
    others: Tensor | float
    """Further losses, weighted alike."""
    tokens: Tensor
    """What would be drafted, each after the known token before it; int64."""


class ReferenceHead(nn.Module):
    """A head goes from row to row by ``scores``, unless it knows better."""

    def scores(self, block: Block, before: Tensor) -> Tensor:
        """What is ranked where the token before each row is known.

        Args:
            block: [...] rows, each by itself.
            before: [...] int64.

        Returns:
            [..., V] float32; minus infinity for what is not drafted.
        """
        raise NotImplementedError

    def draft(self, block: Block, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """What is drafted in blocks [..., K] after the tokens ``anchors`` [...] int64.

        Returns:
            Tokens [..., K] int64, and the scores [..., K, V] that they are the best by.
        """
        before, tokens, scores = anchors, [], []
        if not block.hidden.shape[-2]:
            return anchors[..., None][..., :0], block.logits
        for index in range(block.hidden.shape[-2]):
            scores.append(self.scores(block.row(index), before))
            # Of equal scores, as bfloat16 often has them, argmax takes the first, as every engine
            # does.
            before = scores[-1].argmax(-1)
            tokens.append(before)
        return torch.stack(tokens, -1), torch.stack(scores, -2)

    def lesson(self, block: Block, before: Tensor, labels: Tensor) -> Lesson:
        """What is learned of blocks [..., K] whose tokens are ``labels`` [..., K] int64.

        Args:
            before: [..., K] int64, the token before each label.
        """
        scores = self.scores(block, before)
        return Lesson(cross_entropy(scores, labels), 0.0, scores.detach().argmax(-1))


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Of ``scores`` [..., V] and ``labels`` [...] int64, each by itself: [...]."""
    losses = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape)

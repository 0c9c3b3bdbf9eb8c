"""The training objective: cross-entropy of blocks, weighted by position, as sums that add up over
forwards and workers.

Weights: ``decay``, exp(-(k - 1) / gamma) with a gamma that may rise over the run (arXiv 2602.06036,
2606.02091), or ``dpace``, from the
drafter's own confidence (arXiv 2605.18810, equations 7 to 9). Every sum is divided by a number that
is known before the forward and is the same for all workers, so that how a batch is cut does not
matter.

    pytest tests/unit/test_train_objective.py
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads.reference import Block
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.reference.loss import block_labels, default_gamma, position_weights
from vllm_dflash.reference.masks import block_positions, context_mask
from vllm_dflash.training.batches import Batch
from vllm_dflash.training.tables import Train

_LOGITS_AT_ONCE = 1 << 28
"""Logits (elements) above which a forward ranks its blocks in pieces, and ranks them again in the
backward."""


def gamma_at(table: Train, block_size: int, step: int, steps: int) -> float:
    """gamma of a step, counted from 0: it rises linearly from its start."""
    end = table.gamma or default_gamma(block_size)
    start = table.gamma_start if table.gamma_start is not None else min(1.0, end)
    progress = min(1.0, step / max(1.0, table.gamma_warmup * steps))
    return start + (end - start) * progress


def denominator(
    batch: Batch, lengths: np.ndarray, block_size: int, weights: Tensor | None
) -> float:
    """What the whole batch's sum is divided by: the sum of its weights; for dpace, whose weights
    are not known yet, its number of blocks.

    Args:
        lengths: [B], of the batch's sequences.
        weights: [K], of ``decay``.
    """
    if weights is None:
        return float(batch.exists.sum())
    ends = np.minimum(lengths[:, None] - 1 - batch.anchors, len(weights))
    cumulative = np.concatenate([[0.0], weights.double().cumsum(0).numpy()])
    return float((cumulative[ends] * batch.exists).sum())


def dpace_weights(losses: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """Each position's share in the expected accepted length, from the cross-entropies ``losses``
    [..., K]; detached."""
    confidence = (1 - alpha) * torch.exp(-losses.detach()) + alpha
    reached = confidence.cumprod(-1) * valid.long().cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1)


class Objective(torch.nn.Module):
    """The drafter between the frozen target's embedding and lm_head: one forward's sums."""

    def __init__(
        self,
        model: Any,
        drafter: Drafter,
        table: Train,
        blocks: Callable[..., Any] = context_mask,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            blocks: makes the attention mask of (anchors, block_size, context_length): a dense one,
                or ``flex.block_mask``.
            dtype: what everything is computed in, whatever the target's is; None: autocast's.
        """
        super().__init__()
        self.drafter, self.table, self.blocks, self.dtype = drafter, table, blocks, dtype
        head = model.lm_head
        if dtype is not None and head.weight.dtype != dtype:
            head = copy.deepcopy(head).to(dtype)
            drafter.own = drafter.own.on(head.weight)
        # No submodules: they are frozen, and no part of what is saved.
        self.frozen = (model.get_input_embeddings(), head)

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        anchors: Tensor,
        exists: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of cross-entropies, and the number of greedily accepted tokens over the
        blocks; float32 scalars.

        Args:
            features: [B, S, T * H].
            tokens: int64 [B, S], padded; ``lengths`` int64 [B].
            anchors: int64 [B, N]; ``exists`` bool [B, N].
            weights: [K], of ``decay``; not used by dpace.
        """
        size, first = self.drafter.config.block_size, self.drafter.config.first_row
        embedding, head = self.frozen
        rows, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(rows, -1)
        features = features.to(self.dtype or features.dtype)
        c = self.drafter.context(features)
        context, ends = (
            self.drafter.context_kv(c, positions),
            self.drafter.before_anchors(c, anchors),
        )
        ids = torch.full(
            (*anchors.shape, size), self.drafter.config.mask_token_id, device=tokens.device
        )
        ids[..., 0] = tokens.gather(1, anchors)
        embeds = self.drafter.embed(embedding, ids.flatten(1))
        hidden = self.drafter(
            embeds.to(self.dtype or embeds.dtype),
            block_positions(anchors, size),
            context,
            self.blocks(anchors, size, length),
            size,
        )
        hidden = hidden.unflatten(1, (-1, size))[:, :, first:].flatten(0, 1)
        labels, valid = block_labels(tokens, anchors, size, first)
        at = anchors[..., None] + torch.arange(1, size - first + 1, device=anchors.device)
        valid = valid & (at < lengths[:, None, None]) & exists[..., None]
        before = torch.cat([tokens.gather(1, anchors)[..., None], labels[..., :-1]], dim=-1)
        return self._ranked(
            head,
            hidden,
            before.flatten(0, 1),
            labels.flatten(0, 1),
            valid.flatten(0, 1),
            weights,
            None if ends is None else ends.flatten(0, 1),
        )

    def _ranked(
        self,
        head: Any,
        hidden: Tensor,
        before: Tensor,
        labels: Tensor,
        valid: Tensor,
        weights: Tensor,
        ends: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``forward``'s sums of hidden states [blocks, K, H], each after the token ``before`` it
        [blocks, K], and after the context ``ends`` [blocks, C]; in pieces where all logits at once
        would be too many."""

        def piece(
            h: Tensor, x: Tensor, y: Tensor, v: Tensor, c: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            # A token that the draft vocabulary lacks teaches nothing, and ends what is accepted.
            y, known = self.drafter.draft_labels(y)
            v = v & known

            def rank(rows: Tensor) -> Tensor:
                return self.drafter.draft_logits(head, rows).float()

            block = Block(h, rank(h), self.frozen[0], rank, c)
            lesson = self.drafter.head.lesson(block, x, y)
            share = (
                dpace_weights(lesson.losses, v, self.table.dpace_alpha)
                if self.table.weighting == "dpace"
                else weights
            )
            correct = ((lesson.tokens == y) & v).float()
            return ((lesson.losses + lesson.others) * share * v).sum(), correct.cumprod(-1).sum()

        most = max(1, _LOGITS_AT_ONCE // (labels.shape[1] * self.drafter.config.draft_tokens))
        columns = [hidden, before, labels, valid, *([] if ends is None else [ends])]
        if most >= len(hidden):
            return piece(*columns)
        sums = [
            checkpoint(piece, *part, use_reentrant=False)
            for part in zip(*(column.split(most) for column in columns), strict=True)
        ]
        return torch.stack([s[0] for s in sums]).sum(), torch.stack([s[1] for s in sums]).sum()


def weights_at(table: Train, config: DrafterConfig, step: int, steps: int) -> Tensor:
    """The weights [K] of ``decay`` at a step."""
    return position_weights(
        config.block_size, gamma_at(table, config.block_size, step, steps), config.first_row
    )

"""The trainer's tau: a held-out answer is gone through as decoding would, from one batch of drafts
at all of its places.

A mean over all places says more than decoding gives, for decoding skips ahead where drafts are long
and so meets hard places more often (docs/log.md). The walk starts at the answer's first token, and
its next place is the one after what was accepted.

    pytest tests/unit/test_train_walk.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_dflash.acceptance import Acceptance, tau
from vllm_dflash.reference.decoding import target_features
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.reference.masks import block_positions, context_mask

_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class Walk:
    """What decoding one answer would count."""

    accepted: list[int]
    """Per draft on the way, its accepted tokens."""
    everywhere: list[int]
    """The same at every place of the answer."""


@dataclass(frozen=True)
class Estimate:
    """Over several answers."""

    acceptance: Acceptance
    everywhere: float
    """tau as a mean over all places: what a training loss knows."""

    @property
    def tau(self) -> float:
        return self.acceptance.tau


@torch.inference_mode()
def estimate(
    model: Any,
    drafter: Drafter,
    answers: Sequence[tuple[Sequence[int], int]],
    max_tokens: int,
    eos_token_id: int | None,
    done: Callable[[], object] = lambda: None,
) -> Estimate:
    """tau of whole blocks over (token ids, prompt length) pairs: the target's greedy text,
    ``block_size`` tokens past ``max_tokens``.

    Args:
        done: called after each answer.
    """
    walks = []
    for tokens, prompt_length in answers:
        walks.append(
            walk(
                accepted_everywhere(model, drafter, tokens, prompt_length),
                tokens,
                prompt_length,
                max_tokens,
                eos_token_id,
            )
        )
        done()
    k = drafter.config.max_speculative_tokens
    accepted = [n for w in walks for n in w.accepted]
    everywhere = [n for w in walks for n in w.everywhere]
    return Estimate(Acceptance.of(accepted, k), tau(sum(everywhere), len(everywhere)) or 1.0)


def walk(
    accepted: Sequence[int],
    tokens: Sequence[int],
    prompt_length: int,
    max_tokens: int,
    eos_token_id: int | None,
) -> Walk:
    """The drafts that decoding meets, with the stops of ``decoding.generate``; ``accepted`` is of
    every place from ``prompt_length`` on. Pure."""
    answer = list(tokens[prompt_length:])
    room = min(max_tokens, len(answer))
    on_the_way, made = [], 1
    while made < room and eos_token_id not in answer[:made]:
        step = accepted[made - 1]
        on_the_way.append(step)
        made += step + 1
    end = answer.index(eos_token_id) if eos_token_id in answer else len(answer)
    return Walk(on_the_way, list(accepted[: max(1, min(room, end) - 1)]))


def accepted_everywhere(
    model: Any, drafter: Drafter, tokens: Sequence[int], prompt_length: int
) -> list[int]:
    """Accepted tokens of the draft at every place of the answer that a token follows."""
    device, k = model.device, drafter.config.max_speculative_tokens
    ids = torch.tensor([list(tokens)], device=device)
    features, _ = target_features(model, drafter.config.target_layer_ids, ids, use_cache=False)
    c = drafter.context(features)
    context = drafter.context_kv(c, torch.arange(ids.shape[1], device=device)[None])
    accepted: list[int] = []
    for anchors in _pieces(prompt_length, ids.shape[1] - 1, device):
        at = anchors[0, :, None] + torch.arange(1, k + 1, device=device)
        truth = torch.where(at < ids.shape[1], ids[0][at.clamp(max=ids.shape[1] - 1)], -1)
        before = drafter.before_anchors(c, anchors)
        drafts = _drafts(model, drafter, ids, anchors, context, before)
        accepted += (drafts == truth).long().cumprod(-1).sum(-1).tolist()
    return accepted


def _pieces(first: int, end: int, device: Any) -> Iterator[Tensor]:
    for at in range(first, end, _BLOCKS_AT_ONCE):
        yield torch.arange(at, min(at + _BLOCKS_AT_ONCE, end), device=device)[None]


def _drafts(
    model: Any, drafter: Drafter, ids: Tensor, anchors: Tensor, context: Any, before: Tensor | None
) -> Tensor:
    """Drafted tokens [N, K] of the blocks at ``anchors`` [1, N], ``before`` [1, N, C] of which is
    theirs."""
    size = drafter.config.block_size
    block = torch.full((*anchors.shape, size), drafter.config.mask_token_id, device=ids.device)
    block[..., 0] = ids.gather(1, anchors)
    embedding = model.get_input_embeddings()
    embeds = drafter.embed(embedding, block.flatten(1))
    hidden = drafter(
        embeds,
        block_positions(anchors, size),
        context,
        context_mask(anchors, size, ids.shape[1]),
        size,
    )
    rows = hidden.unflatten(1, (-1, size))[0, :, drafter.config.first_row :]
    ranked = drafter.block(model.lm_head, rows, embedding, None if before is None else before[0])
    return drafter.head.draft(ranked, block[0, :, 0])[0]

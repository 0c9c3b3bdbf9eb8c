"""Greedy draft-and-verify on a Hugging Face causal language model, one sequence at a time:
evaluation and oracle.

With no drafter (or ``num_speculative_tokens=0``) the same loop is plain decoding: the baseline.
Limits: greedy, batch 1, decoder layers at ``target.model.layers`` (Qwen3, Llama and their like).

Tests: ``pytest tests/unit/test_reference.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_dflash.reference.drafter import ContextKV, Drafter
from vllm_dflash.reference.masks import context_mask

_POSITIONS_AT_ONCE = 1 << 14
"""Of contexts, in a batch of blocks: some hundred megabytes."""


@dataclass(frozen=True)
class Draft:
    """What was drafted at one anchor position: its position, the tokens after it, each one's logit,
    and its lead over the second."""

    anchor: int
    tokens: list[int]
    gaps: list[float]
    tops: list[float]


@dataclass(frozen=True)
class Step:
    """One draft and its verification; ``accepted`` of the draft's tokens were the target's own
    choice."""

    draft: Draft
    accepted: int


@dataclass
class Generation:
    """What ``generate`` returns: the new tokens, and a record of every verification."""

    tokens: list[int]
    steps: list[Step] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens committed per target forward after the prefill, the bonus token
        included."""
        return 1 + sum(step.accepted for step in self.steps) / max(1, len(self.steps))


@contextmanager
def captured_features(target: Any, layer_ids: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collects the outputs [B, S, H] of the target's decoder layers ``layer_ids`` (zero-based)
    during one forward.

    Hooks rather than ``output_hidden_states``: the last entry of that is after the final norm, and
    a drafter
    needs the residual stream before it.
    """
    kept: dict[int, Tensor] = {}
    result: list[Tensor] = []

    def keep(layer_id: int, output: Any) -> None:
        kept[layer_id] = output[0] if isinstance(output, tuple) else output

    handles = [
        target.model.layers[i].register_forward_hook(lambda _m, _a, out, i=i: keep(i, out))
        for i in layer_ids
    ]
    try:
        yield result
        result.extend(kept[i] for i in layer_ids)
    finally:
        for handle in handles:
            handle.remove()


def target_features(
    target: Any, layer_ids: Sequence[int], input_ids: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """One target forward over ``input_ids`` [B, S]: features [B, S, T * H] and the final hidden
    state [B, S, H]."""
    with captured_features(target, layer_ids) as features:
        hidden = target.model(input_ids=input_ids, **kwargs).last_hidden_state
    return torch.cat(features, dim=-1) if features else hidden[..., :0], hidden


def draft_block(
    target: Any,
    drafter: Drafter,
    token: int,
    anchor: int,
    context: ContextKV,
    num_tokens: int,
    max_model_len: int | None = None,
    before: Tensor | None = None,
) -> Draft:
    """Drafts up to ``num_tokens`` tokens after ``token`` at position ``anchor``; ``context`` holds
    positions before it, ``before`` [C] is of ``Drafter.before_anchors``.

    Always the whole block, of which the first tokens are taken: a drafter that was trained on whole
    blocks drafts badly in a shorter one. Only ``max_model_len`` cuts it, as there are no positions
    past it.
    """
    size = _block_size(drafter, anchor, max_model_len)
    (draft,) = _draft_blocks(
        target,
        drafter,
        torch.tensor([token], device=target.device),
        torch.tensor([anchor], device=target.device),
        size,
        context,
        None,
        num_tokens,
        None if before is None else before[None],
    )
    return draft


def _block_size(drafter: Drafter, anchor: int, max_model_len: int | None) -> int:
    """Positions of the block at ``anchor``."""
    size = drafter.config.block_size
    return size if max_model_len is None else min(size, max_model_len - anchor)


def _draft_blocks(
    target: Any,
    drafter: Drafter,
    tokens: Tensor,
    anchors: Tensor,
    num_queries: int,
    context: ContextKV,
    mask: Tensor | None,
    num_tokens: int,
    before: Tensor | None,
) -> list[Draft]:
    """The blocks after ``tokens`` [N] at ``anchors`` [N], of ``num_queries`` positions each;
    ``context`` [N, S, ...], ``mask`` [N, 1, Q, S + Q] and ``before`` [N, C] are as the drafter
    takes them."""
    device = target.device
    ids = torch.full((len(anchors), num_queries), drafter.config.mask_token_id, device=device)
    ids[:, 0] = tokens
    positions = anchors[:, None] + torch.arange(num_queries, device=device)
    embeds = drafter.embed(target.get_input_embeddings(), ids)
    hidden = drafter(embeds, positions, context, mask)
    # Mostly the query at position n + k predicts the token at n + k itself, and the anchor's own
    # output is unused.
    first, size = drafter.config.first_row, drafter.config.block_size
    # A head over the block ranks a whole one: rows past the end are as the last one that there is.
    rows = torch.arange(first, size, device=device).clamp(max=num_queries - 1)
    block = drafter.block(target.lm_head, hidden[:, rows], target.get_input_embeddings(), before)
    drafted, scores = drafter.head.draft(block, tokens)
    num_tokens = max(0, min(num_tokens, num_queries - first))
    drafted, scores = drafted[:, :num_tokens], scores[:, :num_tokens]
    best, second = scores.topk(2, dim=-1).values.unbind(-1)
    found = zip(
        anchors.tolist(), drafted.tolist(), (best - second).tolist(), best.tolist(), strict=True
    )
    return [Draft(*each) for each in found]


class _Loop:
    """A sequence's state: the target's cache and the drafter's context, both over the committed
    positions only."""

    def __init__(self, target: Any, drafter: Drafter | None) -> None:
        self.target, self.drafter = target, drafter
        self.cache = DynamicCache(config=target.config)
        self.context: ContextKV | None = None
        self.before: Tensor | None = None
        self.computed = 0

    def run_target(self, ids: list[int]) -> tuple[list[int], Tensor]:
        """The target's choice after each of ``ids`` (at positions computed..), and their features
        [1, n, T * H]."""
        layer_ids = self.drafter.config.target_layer_ids if self.drafter else ()
        input_ids = torch.tensor([ids], device=self.target.device)
        features, hidden = target_features(
            self.target, layer_ids, input_ids, past_key_values=self.cache, use_cache=True
        )
        return self.target.lm_head(hidden[0]).float().argmax(-1).tolist(), features

    def commit(self, features: Tensor) -> None:
        """Keeps the first ``features.shape[1]`` positions of the last target forward; drops the
        rejected rest."""
        start, self.computed = self.computed, self.computed + features.shape[1]
        surplus = self.cache.get_seq_length() - self.computed
        if surplus:
            # A negative argument removes that many from the end.
            self.cache.crop(-surplus)
        if self.drafter is None:
            return
        positions = torch.arange(start, self.computed, device=features.device)[None]
        c = self.drafter.context(features)
        new = self.drafter.context_kv(c, positions)
        end = torch.full_like(positions[:, :1], features.shape[1])
        last = self.drafter.before_anchors(c, end)
        self.before = None if last is None else last[0, 0]
        if self.context is None:
            self.context = new
            return
        self.context = [
            (torch.cat([k0, k1], 1), torch.cat([v0, v1], 1))
            for (k0, v0), (k1, v1) in zip(self.context, new, strict=True)
        ]

    def step(self, token: int, num_tokens: int, max_model_len: int | None) -> tuple[Step, int]:
        """Drafts after ``token`` at position ``computed``, verifies, commits; returns also the
        bonus token."""
        draft = Draft(self.computed, [], [], [])
        if (
            self.drafter is not None
            and num_tokens
            and (max_model_len is None or self.computed + 1 < max_model_len)
        ):
            assert self.context is not None, "the prompt is committed first"
            draft = draft_block(
                self.target,
                self.drafter,
                token,
                self.computed,
                self.context,
                num_tokens,
                max_model_len,
                self.before,
            )
        choices, features = self.run_target([token, *draft.tokens])
        accepted = 0
        while accepted < len(draft.tokens) and draft.tokens[accepted] == choices[accepted]:
            accepted += 1
        self.commit(features[:, : accepted + 1])
        return Step(draft, accepted), choices[accepted]


@torch.inference_mode()
def generate(
    target: Any,
    drafter: Drafter | None,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    num_speculative_tokens: int,
    eos_token_id: int | None = None,
    max_model_len: int | None = None,
) -> Generation:
    """Greedy generation; the tokens are the target's own, whatever the drafter.

    A draft has ``num_speculative_tokens`` tokens, fewer where ``max_model_len`` leaves less room.
    The last step counts in full in the record, even where the output is cut at ``max_new_tokens``,
    as in vLLM's counters.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token id")
    loop = _Loop(target, drafter)
    choices, features = loop.run_target(list(prompt_ids))
    loop.commit(features)
    out = Generation([choices[-1]])
    room = (
        max_new_tokens
        if max_model_len is None
        else min(max_new_tokens, max_model_len - len(prompt_ids))
    )
    while len(out.tokens) < room and out.tokens[-1] != eos_token_id:
        step, bonus = loop.step(out.tokens[-1], num_speculative_tokens, max_model_len)
        out.steps.append(step)
        out.tokens += [*step.draft.tokens[: step.accepted], bonus]
        if eos_token_id in out.tokens:
            out.tokens = out.tokens[: out.tokens.index(eos_token_id) + 1]
    del out.tokens[max(0, room) :]
    return out


@torch.inference_mode()
def replay_drafts(
    target: Any,
    drafter: Drafter,
    token_ids: Sequence[int],
    anchors: Sequence[int],
    num_speculative_tokens: int,
    max_model_len: int | None = None,
) -> list[Draft]:
    """What the drafter drafts at each anchor position of a committed sequence, from one target
    forward over it.

    Args:
        token_ids: the whole sequence x, prompt included.
        anchors: positions n >= 1; the context is 0..n-1 and the anchor token is x[n].
    """
    input_ids = torch.tensor([list(token_ids)], device=target.device)
    features, _ = target_features(
        target, drafter.config.target_layer_ids, input_ids, use_cache=False
    )
    positions = torch.arange(len(token_ids), device=target.device)[None]
    c = drafter.context(features)
    context = drafter.context_kv(c, positions)
    drafts, at_once = dict[int, Draft](), max(1, _POSITIONS_AT_ONCE // len(token_ids))
    sizes = [_block_size(drafter, n, max_model_len) for n in anchors]
    places = groupby(range(len(sizes)), lambda i: (i // at_once, sizes[i]))
    for (_, size), group in places:
        at = torch.tensor([anchors[i] for i in group], device=target.device)
        before = drafter.before_anchors(c, at[None])
        # Each block is a row of the batch: it sees the context before it, and all of itself.
        seen = context_mask(at[:, None], size, len(token_ids))
        own = torch.ones(len(at), 1, size, size, dtype=torch.bool, device=target.device)
        rows = [
            (k.expand(len(at), *k.shape[1:]), v.expand(len(at), *v.shape[1:])) for k, v in context
        ]
        for draft in _draft_blocks(
            target,
            drafter,
            input_ids[0, at],
            at,
            size,
            rows,
            torch.cat([seen, own], dim=-1),
            num_speculative_tokens,
            None if before is None else before[0],
        ):
            drafts[draft.anchor] = draft
    return [drafts[n] for n in anchors]

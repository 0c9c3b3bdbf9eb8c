"""Trains a drafter for a moment on a tiny target's own text, so that some of its drafts are
accepted and tau says something."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.checkpoint import new_drafter, save_drafter
from vllm_dflash.reference.decoding import target_features
from vllm_dflash.reference.loss import block_labels
from vllm_dflash.reference.masks import block_positions, context_mask


@torch.no_grad()
def continued(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
    """Prompts of one length and the model's greedy continuations, [prompts, length]: a step for all
    at a time."""
    tokens, cache = torch.tensor(prompts), DynamicCache(config=model.config)
    for _ in range(new_tokens):
        logits = model(tokens[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def train_briefly(
    target: Path,
    folder: Path,
    config: DrafterConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    steps: int,
    blocks: int = 12,
) -> Path:
    """A drafter that knows the target's greedy continuations of ``prompts`` in part; float32;
    returns its folder.

    The prompts have one length, so that all of them are one batch. A step learns ``blocks`` of
    each.
    """
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).requires_grad_(False)
    drafter, size = new_drafter(config), config.block_size
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = continued(model, prompts, new_tokens)
    features = target_features(model, config.target_layer_ids, tokens)[0]
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, -1)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=4e-3)
    for _ in range(steps):
        anchors = torch.randint(len(prompts[0]), length - size, (rows, blocks))
        ids = torch.full((*anchors.shape, size), config.mask_token_id)
        ids[..., 0] = tokens.gather(1, anchors)
        c = drafter.context(features)
        context = drafter.context_kv(c, positions)
        mask = context_mask(anchors, size, length)
        hidden = drafter(
            model.get_input_embeddings()(ids.flatten(1)),
            block_positions(anchors, size),
            context,
            mask,
            size,
        )
        hidden = hidden.unflatten(1, (-1, size))[:, :, config.first_row :]
        labels, _ = block_labels(tokens, anchors, size, config.first_row)
        before = torch.cat([ids[..., :1], labels[..., :-1]], -1)
        block = drafter.block(
            model.lm_head, hidden, model.get_input_embeddings(), drafter.before_anchors(c, anchors)
        )
        lesson = drafter.head.lesson(block, before, labels)
        loss = (lesson.losses + lesson.others).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_drafter(folder, drafter.eval())
    return folder

"""Trains the embedded pair's drafter: three DFlash layers that draft blocks of eight tokens for the frozen target.

Stage three of three (see ``make.sh`` beside this file). The target's features of all sequences are computed once and
kept in memory (1.5 KB a token); every epoch draws new anchors. The same optimizer as the target's: Muon and AdamW
with float32 masters; the learning rate is constant and decays linearly over the last 40 % of the budget. At the end
it measures the acceptance length on held-out prompts by decoding, the figure that serving is compared with.

    python examples/embedded_pair/train_drafter.py --target /tmp/pair/target --data /tmp/pair/data.npz \
        --prompts examples/embedded_pair/prompts.jsonl --out /tmp/pair/dflash --minutes 35
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange
from train_target import MasterOptimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from vllm_dflash.conditioning.dflash import Reference as DFlashDrafter
from vllm_dflash.config import DrafterConfig, TargetShape, default_target_layer_ids
from vllm_dflash.reference.checkpoint import load_drafter, save_drafter
from vllm_dflash.reference.decoding import generate, target_features
from vllm_dflash.reference.loss import acceptance_length, block_labels, block_loss, default_gamma, position_weights
from vllm_dflash.reference.masks import block_positions, context_mask

BLOCK_SIZE = 8
_DECAY = 0.4
"""Share of the budget over which the learning rate falls to zero."""


def drafter_config(target: Qwen3ForCausalLM, mask_token_id: int, layers: int) -> DrafterConfig:
    """The drafter's shape: the target's widths, ``layers`` deep, 2.6 M parameters at three."""
    shape, c = TargetShape.from_hf(target.config), target.config
    return DrafterConfig(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
        vocab_size=c.vocab_size, block_size=BLOCK_SIZE,
        mask_token_id=mask_token_id, target_layer_ids=default_target_layer_ids(layers, shape.num_hidden_layers),
        num_target_layers=shape.num_hidden_layers, max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_parameters["rope_theta"],
    )  # fmt: skip


@torch.no_grad()
def new_drafter(target: Qwen3ForCausalLM, mask_token_id: int, layers: int) -> DFlashDrafter:
    """A drafter to begin with: random layers, and the target's final norm, which its lm_head was trained behind."""
    drafter = DFlashDrafter(drafter_config(target, mask_token_id, layers))
    drafter.norm.weight.copy_(target.model.norm.weight)
    return drafter.bfloat16()


@torch.inference_mode()
def all_features(target: Qwen3ForCausalLM, tokens: Tensor, layer_ids: tuple[int, ...]) -> Tensor:
    """Features bfloat16 [N, S, T * H] of ``tokens`` [N, S]."""
    kept = torch.empty(*tokens.shape, len(layer_ids) * target.config.hidden_size, dtype=torch.bfloat16)
    for at in trange(0, len(tokens), 32, desc="features"):
        kept[at : at + 32] = target_features(target, layer_ids, tokens[at : at + 32].int(), use_cache=False)[0]
    return kept


def make_loss(target: Qwen3ForCausalLM, drafter: DFlashDrafter, gamma: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that is compiled: one batch's loss and greedy acceptance length."""
    embedding, head = target.get_input_embeddings().weight, target.lm_head.weight
    weights, mask_id = position_weights(BLOCK_SIZE, gamma), drafter.config.mask_token_id

    def loss_fn(features: Tensor, tokens: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:  # [B, S, T * H], [B, S], [B, N]
        rows, length = tokens.shape
        c = drafter.context(features)
        context = drafter.context_kv(c, torch.arange(length).expand(rows, -1))
        ids = torch.full((*anchors.shape, BLOCK_SIZE), mask_id)
        ids[..., 0] = tokens.gather(1, anchors)
        embeds = torch.nn.functional.embedding(ids.flatten(1), embedding)
        hidden = drafter(embeds, block_positions(anchors, BLOCK_SIZE), context, context_mask(anchors, BLOCK_SIZE, length), BLOCK_SIZE)
        logits = hidden.unflatten(1, (-1, BLOCK_SIZE))[:, :, 1:] @ head.t()
        labels, valid = block_labels(tokens, anchors, BLOCK_SIZE)
        return block_loss(logits, labels, valid, weights), acceptance_length(logits.detach().argmax(-1), labels, valid)

    return loss_fn


class Batches:
    """Endless batches of sequences, in a new order each epoch, with new anchors within the responses."""

    def __init__(self, features: Tensor, tokens: Tensor, first_anchor: int, batch: int, anchors: int) -> None:
        self.features, self.tokens, self.batch, self.anchors = features, tokens, batch, anchors
        # Whole blocks only, and as many anchors a sequence as there are places at most.
        self.places = np.arange(first_anchor, tokens.shape[1] - BLOCK_SIZE + 1)
        self.rng, self.order, self.epochs = np.random.default_rng(0), np.empty(0, np.int64), 0
        if len(tokens) < batch or len(self.places) < anchors:
            places = f"{len(tokens)} sequences with {len(self.places)} anchor places"
            raise SystemExit(f"{places} are too few: lower --batch or --anchors, or generate more")

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, S, T * H], tokens int64 [B, S], anchors int64 [B, N] in ascending order."""
        if len(self.order) < self.batch:
            self.order, self.epochs = self.rng.permutation(len(self.tokens)), self.epochs + 1
        rows, self.order = torch.from_numpy(self.order[: self.batch]), self.order[self.batch :]
        chosen = np.stack([np.sort(self.rng.choice(self.places, self.anchors, replace=False)) for _ in rows])
        return self.features[rows], self.tokens[rows].long(), torch.from_numpy(chosen)


def held_out_tau(target: Qwen3ForCausalLM, drafter: DFlashDrafter, tokenizer: PreTrainedTokenizerFast, path: str, new_tokens: int) -> dict:
    """Acceptance length over the prompts of a .jsonl file, decoded greedily with whole blocks."""
    accepted, drafts = 0, 0
    for line in tqdm(Path(path).read_text().splitlines(), desc="held-out prompts"):
        prompt = tokenizer(json.loads(line)["prompt"])["input_ids"]
        steps = generate(target, drafter, prompt, new_tokens, BLOCK_SIZE - 1).steps
        accepted, drafts = accepted + sum(step.accepted for step in steps), drafts + len(steps)
    return {"held_out_tau": round(1 + accepted / drafts, 3), "held_out_drafts": drafts, "held_out_new_tokens": new_tokens}


def optimize(args: argparse.Namespace, loss_fn: Callable[..., tuple[Tensor, Tensor]], drafter: DFlashDrafter, batches: Batches) -> dict:
    """Trains ``drafter`` in place for ``args.steps`` or ``args.minutes``, saving it on the way; returns the record."""
    optimizer = MasterOptimizer(drafter, muon_lr=args.lr, adam_lr=args.lr)
    compiled = torch.compile(loss_fn)
    compiled(*batches.next())[0].backward()
    drafter.zero_grad()
    start, step, losses, taus = time.time(), 0, [], []
    bar = tqdm(total=1000, desc="train drafter", bar_format="{l_bar}{bar}| {elapsed} {postfix}")
    while (progress := step / args.steps if args.steps else (time.time() - start) / (args.minutes * 60)) < 1:
        loss, tau = compiled(*batches.next())
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / _DECAY))
        losses.append(loss.item())
        taus.append(tau.item())
        step += 1
        bar.n = round(1000 * progress)
        bar.set_postfix_str(f"step {step} epoch {batches.epochs} loss {np.mean(losses[-50:]):.3f} tau {np.mean(taus[-50:]):.2f}")
        if step % 200 == 0:
            save_drafter(args.out, drafter)
    bar.n = bar.total
    bar.close()
    means = {
        "minutes": round((time.time() - start) / 60, 1),
        "loss": round(float(np.mean(losses[-100:])), 4),
        "training_tau": round(float(np.mean(taus[-100:])), 3),
    }
    return {"steps": step, "epochs": batches.epochs, "blocks": step * batches.batch * batches.anchors} | means


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval().requires_grad_(False)
    drafter = load_drafter(args.init, torch.bfloat16) if args.init else new_drafter(target, tokenizer.mask_token_id, args.layers)
    data = np.load(args.data)
    tokens = torch.from_numpy(np.concatenate([data["prompts"], data["responses"]], axis=1))
    features = all_features(target, tokens, drafter.config.target_layer_ids)
    batches = Batches(features, tokens, data["prompts"].shape[1], args.batch, args.anchors)
    gamma = args.gamma or default_gamma(BLOCK_SIZE)
    record = optimize(args, make_loss(target, drafter, gamma), drafter.train(), batches)
    record |= {"sequences": len(tokens), "gamma": gamma, "lr": args.lr, "torch": torch.__version__}
    save_drafter(args.out, drafter.eval())
    if args.prompts:
        record |= held_out_tau(target, drafter, tokenizer, args.prompts, data["responses"].shape[1])
    (Path(args.out) / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder of the target and its tokenizer")
    parser.add_argument("--data", required=True, help="the .npz file that generate.py wrote")
    parser.add_argument("--out", required=True, help="folder to write the drafter to")
    parser.add_argument("--prompts", help="held-out prompts (.jsonl) to measure the acceptance length on at the end")
    parser.add_argument("--init", help="folder of a drafter to continue from")
    parser.add_argument(
        "--minutes", type=float, default=35, help="wall-clock budget of the training itself (default: 35, on two idle cores)"
    )
    parser.add_argument("--steps", type=int, help="this many steps instead of a wall-clock budget: for a machine that is not idle")
    parser.add_argument("--layers", type=int, default=3, help="draft layers (default: 3)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default: 16)")
    parser.add_argument("--anchors", type=int, default=32, help="blocks a sequence (default: 32)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: 4e-3)")
    parser.add_argument("--gamma", type=float, help="decay of the position weights (default: by block size, 4)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

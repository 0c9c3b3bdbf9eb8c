"""What drawing a draft brings at temperature 1, in plain PyTorch: tau of drafts of the likeliest
tokens, and of drafts that are drawn from what the drafter makes of each row.

A drawn token x is accepted with probability min(1, p(x) / q(x)), and otherwise replaced by one
drawn from max(p - q, 0); the likeliest one is accepted with probability p(x). Both leave the
target's distribution p as it is (Leviathan et al., 2023, arXiv 2211.17192). q is the softmax of the
head's scores over --draft-temperature.

    .venv/bin/python examples/sampled_drafts.py --target examples/embedded_pair/target \\
        --draft examples/embedded_pair/dflare --prompts examples/embedded_pair/prompts.jsonl
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from vllm_dflash.hub import load_model, load_tokenizer
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import target_features
from vllm_dflash.reference.drafter import ContextKV, Drafter


class Sequence:
    """A sequence's committed positions: the target's cache and the drafter's context."""

    def __init__(self, target: Any, drafter: Drafter) -> None:
        self.target, self.drafter, self.length = target, drafter, 0
        self.cache = DynamicCache(config=target.config)
        self.context: ContextKV = []
        self.before: Tensor | None = None

    def run(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """The target's distributions after each of ``ids`` [n, V], and their features."""
        features, hidden = target_features(
            self.target,
            self.drafter.config.target_layer_ids,
            torch.tensor([ids]),
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.target.lm_head(hidden[0]).float().softmax(-1), features

    def commit(self, features: Tensor) -> None:
        """Keeps the first positions of the last run, as many as there are ``features``."""
        positions = torch.arange(self.length, self.length + features.shape[1])[None]
        self.length += features.shape[1]
        if surplus := self.cache.get_seq_length() - self.length:
            self.cache.crop(-surplus)
        c = self.drafter.context(features)
        new = self.drafter.context_kv(c, positions)
        last = self.drafter.before_anchors(c, torch.tensor([[features.shape[1]]]))
        self.before = None if last is None else last[0, 0]
        self.context = (
            [
                (torch.cat([k0, k1], 1), torch.cat([v0, v1], 1))
                for (k0, v0), (k1, v1) in zip(self.context, new, strict=True)
            ]
            if self.context
            else new
        )

    def draft(self, token: int, temperature: float | None) -> list[tuple[int, Tensor]]:
        """Tokens after ``token``, each with the distribution [V] that it was drawn from; the
        likeliest ones where ``temperature`` is None."""
        config, drafter = self.drafter.config, self.drafter
        ids = torch.full((1, config.block_size), config.mask_token_id)
        ids[0, 0] = token
        positions = torch.arange(self.length, self.length + config.block_size)[None]
        embedding = self.target.get_input_embeddings()
        hidden = drafter(drafter.embed(embedding, ids), positions, self.context)
        block = drafter.block(
            self.target.lm_head, hidden[0, config.first_row :], embedding, self.before
        )
        if drafter.config.draft_vocab_size:
            raise SystemExit("a draft vocabulary of its own is not read here")
        if temperature is None:
            tokens, _ = drafter.head.draft(block, ids[0, 0])
            return list(zip(tokens.tolist(), F.one_hot(tokens, config.vocab_size), strict=True))
        drawn, before = [], ids[0, 0]
        for row in range(block.hidden.shape[0]):
            q = (drafter.head.scores(block.row(row), before) / temperature).softmax(-1)
            before = torch.multinomial(q, 1)[0]
            drawn.append((int(before), q))
        return drawn


def verify(p: Tensor, draft: list[tuple[int, Tensor]]) -> tuple[int, int]:
    """How many of a draft's tokens are accepted, and the token after them; ``p`` [n + 1, V]."""
    for index, (token, q) in enumerate(draft):
        if torch.rand(()) * q[token] >= p[index, token]:
            rest = (p[index] - q).clamp(min=0)
            return index, int(torch.multinomial(rest, 1))
    return len(draft), int(torch.multinomial(p[len(draft)], 1))


@torch.inference_mode()
def tau_of(
    target: Any,
    drafter: Drafter,
    prompts: list[list[int]],
    num_tokens: int,
    temperature: float | None,
) -> list[float]:
    """tau of each prompt's sampled answer."""
    found = []
    for prompt in tqdm(prompts, desc="prompts", leave=False):
        sequence = Sequence(target, drafter)
        p, features = sequence.run(prompt)
        sequence.commit(features)
        token, committed, steps = int(torch.multinomial(p[-1], 1)), 1, 0
        while committed < num_tokens:
            draft = sequence.draft(token, temperature)
            p, features = sequence.run([token, *(one for one, _ in draft)])
            accepted, token = verify(p, draft)
            sequence.commit(features[:, : accepted + 1])
            committed, steps = committed + accepted + 1, steps + 1
        found.append((committed - 1) / steps)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="the target's folder")
    parser.add_argument(
        "--draft", required=True, nargs="+", type=Path, help="folders of its drafters"
    )
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines with prompt")
    parser.add_argument("--count", type=int, default=64, help="prompts (default: 64)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument(
        "--draft-temperature",
        type=float,
        nargs="+",
        default=[1.0, 0.7, 0.5],
        help="that drafts are drawn at (default: 1.0 0.7 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    args = parser.parse_args()
    target, tokenizer = load_model(args.target, "float32", "cpu"), load_tokenizer(args.target)
    if tokenizer is None:
        raise SystemExit(f"{args.target} has no tokenizer that can be read: give a target's folder")
    lines = args.prompts.read_text().splitlines()[: args.count]
    prompts = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    print("| drafter | likeliest | " + " | ".join(f"drawn at {t}" for t in args.draft_temperature))
    for folder in args.draft:
        drafter, row = load_drafter(folder, torch.float32), []
        for temperature in (None, *args.draft_temperature):
            torch.manual_seed(args.seed)
            taus = torch.tensor(tau_of(target, drafter, prompts, args.tokens, temperature))
            error = 1.96 * float(taus.std()) / len(taus) ** 0.5
            row.append(f"{float(taus.mean()):.2f} ± {error:.2f}")
        print(f"| {folder} | " + " | ".join(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tunes the embedded target on another kind of text, as a user would: LoRA on all projections,
merged into the weights. The text is the Python documentation that Python itself brings
(pydoc_data.topics): English with markup, where the target knows source code.

    python examples/follow/finetune.py --out /tmp/finetuned
    python examples/follow/finetune.py --out /tmp/finetuned --steps 20     # to see it run

Writes OUT/target, and OUT/prompts.jsonl: beginnings of paragraphs that no step has seen.
"""

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dflash import hub

PAIR = Path(__file__).resolve().parents[1] / "embedded_pair"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ROWS, LENGTH, PROMPT_TOKENS = 16, 8, 192, 24


class Lora(nn.Module):
    """A frozen linear layer and a learned change of a low rank."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        out: Tensor = self.linear(x) + x @ self.a.t() @ self.b.t()
        return out

    def merged(self) -> nn.Linear:
        """The layer with the change in its weight."""
        with torch.no_grad():
            self.linear.weight += self.b @ self.a
        return self.linear


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=PAIR / "target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--prompts", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = hub.load_tokenizer(str(args.target))
    seen, unseen = split(tokenizer)
    model = hub.load_model(str(args.target), "float32", "cpu")
    fine_tune(model, seen, args.steps, args.lr)
    target = args.out / "target"
    target.mkdir(parents=True, exist_ok=True)
    for path in args.target.iterdir():
        if path.name.startswith(("tokenizer", "generation_config")):
            shutil.copy(path, target)
    model.to(torch.bfloat16).save_pretrained(target)
    rows = list(prompts(unseen, args.prompts))
    lines = "".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows)
    (args.out / "prompts.jsonl").write_text(lines)
    print(f"{target}, and {len(rows)} prompts of the same kind of text")


def split(tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Tokens to learn from, as one text, and those of each topic that is left out: one in four, by
    a hash of its name."""
    seen: list[int] = []
    unseen: list[list[int]] = []
    for name, text in sorted(topics.topics.items()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if hashlib.sha256(name.encode()).digest()[0] % 4 == 0:
            unseen.append(ids)
        else:
            seen += ids
    return seen, unseen


def fine_tune(model: Any, tokens: list[int], steps: int, lr: float) -> None:
    """Trains a LoRA of all projections, and merges it, in place."""
    model.requires_grad_(False)
    layers = []
    for module in list(model.modules()):
        for name in PROJECTIONS:
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                layers.append((module, name, Lora(linear)))
    for module, name, lora in layers:
        setattr(module, name, lora)
    learned = [p for *_, lora in layers for p in (lora.a, lora.b)]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    text, dice = torch.tensor(tokens), random.Random(0)
    for step in range(steps):
        starts = [dice.randrange(len(text) - LENGTH) for _ in range(ROWS)]
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    for module, name, lora in layers:
        setattr(module, name, lora.merged())


def prompts(unseen: list[list[int]], count: int) -> Iterator[list[int]]:
    """Pieces of the topics that are left out, from places by chance."""
    dice = random.Random(1)
    texts = [ids for ids in unseen if len(ids) > 2 * PROMPT_TOKENS]
    for _ in range(count):
        ids = dice.choice(texts)
        start = dice.randrange(len(ids) - PROMPT_TOKENS)
        yield ids[start : start + PROMPT_TOKENS]


if __name__ == "__main__":
    main()

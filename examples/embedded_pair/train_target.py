"""Trains the embedded pair's target: a small Qwen3 language model of Python source, with a
tokenizer of its own.

Stage one of three (see ``make.sh`` beside this file). Byte-level BPE over the corpus, then
next-token training in
bfloat16 with float32 master weights: Muon for the matrices of the layers, AdamW for the rest. The
learning rate
is constant and decays linearly over the last 40 % of the budget.

    python examples/embedded_pair/train_target.py --out /tmp/pair/target --steps 740
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from corpus import read_files
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 4096
END, MASK = "<|endoftext|>", "<|mask|>"
# A line break keeps its indentation, so that the structure of Python is a token and not a run of
# spaces.
_PIECES = r"\n[ ]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s+"

# A conversation is source code, a message a line: one message is its text, as in a completion.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] or '' }}{% if not loop.last %}{{ '\\n' }}{%"
    " endif %}{% endfor %}"
)


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Trains and saves the tokenizer: 4,096 byte-level BPE tokens, among them an end and a mask
    token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        mask_token=MASK,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(out, save_jinja_files=False)
    return fast


def target_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The target's shape: 7.3 M parameters, 8 layers, grouped-query attention, tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=8,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


class MasterOptimizer:
    """Muon on the layers' matrices and AdamW on the rest, in float32, for a model held in
    bfloat16."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float) -> None:
        self.pairs = [
            (p, p.detach().float().clone().requires_grad_())
            for p in model.parameters()
            if p.requires_grad
        ]
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        matrix = [
            m
            for (_, m), n in zip(self.pairs, names, strict=True)
            if m.ndim == 2 and "embed" not in n and "lm_head" not in n
        ]
        chosen = {id(m) for m in matrix}
        rest = [m for _, m in self.pairs if id(m) not in chosen]
        self.optimizers = [
            torch.optim.Muon(
                matrix, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.base = [muon_lr, adam_lr]

    def step(self, scale: float) -> None:
        """One step with the gradients of the bfloat16 parameters; ``scale`` multiplies both
        learning rates."""
        for p, master in self.pairs:
            master.grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_([m for _, m in self.pairs], 1.0)
        for optimizer, lr in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(master)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    out = Path(args.out)
    texts = [text for _, text in read_files(held_out=False)]
    tokenizer = train_tokenizer(texts, out)
    ids = np.concatenate(
        [
            np.array(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id], np.int64)
            for t in tqdm(texts, desc="tokenize")
        ]
    )
    print(f"{len(ids):,} tokens, {sum(map(len, texts)) / len(ids):.2f} characters a token")
    if args.init:
        model = Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.bfloat16)
    else:
        model = Qwen3ForCausalLM(target_config(tokenizer)).bfloat16()
    optimizer = MasterOptimizer(model, muon_lr=args.lr, adam_lr=args.lr)

    def loss_fn(x: torch.Tensor) -> torch.Tensor:  # x: [batch, length + 1]
        hidden = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten())

    compiled = torch.compile(loss_fn)
    rng, history = np.random.default_rng(args.seed), []
    bar = tqdm(range(args.steps), desc="train target")
    for step in bar:
        total = 0.0
        for _ in range(args.accumulate):
            at = rng.integers(0, len(ids) - args.length - 1, args.batch)
            x = torch.from_numpy(np.stack([ids[a : a + args.length + 1] for a in at]))
            loss = compiled(x) / args.accumulate
            loss.backward()
            total += loss.item()
        optimizer.step(min(1.0, (step + 1) / 50) * min(1.0, (1 - step / args.steps) * 2.5 + 0.02))
        history.append(total)
        bar.set_postfix_str(f"loss {np.mean(history[-20:]):.3f}")
        if step % 100 == 99:
            model.save_pretrained(out)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokens = args.steps * args.accumulate * args.batch * args.length
    record = {
        "steps": args.steps,
        "tokens": tokens,
        "loss": round(float(np.mean(history[-50:])), 4),
        "init": bool(args.init),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="folder to write the model and its tokenizer to"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=740,
        help="optimizer steps (default: 740, about 30 minutes on two idle cores)",
    )
    parser.add_argument("--init", help="continue from this folder's weights")
    parser.add_argument(
        "--seed", type=int, default=0, help="order of the training sequences (default: 0)"
    )
    parser.add_argument("--length", type=int, default=384, help="tokens a sequence (default: 384)")
    parser.add_argument("--batch", type=int, default=10, help="sequences a forward (default: 10)")
    parser.add_argument("--accumulate", type=int, default=2, help="forwards a step (default: 2)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

"""An EAGLE-3 head trained on what a DFlash drafter was trained on: the rival in the benchmark.

    python examples/smollm2/eagle3/train_eagle3.py RUN --out HEAD-RUN

RUN is the folder of ``vllm-dflash train``, whose stage ``generate`` is finished. The head sees the
same answers in the same order, as many steps of as many sequences as that run's settings say. The
model, its loss and its optimizer are the speculators library's (0.9.0); the loop is here, because
that library's own needs an accelerator. Stopped, the same command goes on. Limits: one process,
target layers at ``model.layers``.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import CollateFn
from speculators.train.optimizers import build_optimizers
from speculators.train.trainer import TrainerConfig
from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
from transformers import LlamaConfig

from vllm_dflash import hub, smollm2
from vllm_dflash.files import claim, disk_refusals, put, whole_file, whole_folder, write_record
from vllm_dflash.progress import Progress
from vllm_dflash.reference.decoding import target_features
from vllm_dflash.training.batches import Plan
from vllm_dflash.training.features import padded
from vllm_dflash.training.optimizer import computes_bfloat16
from vllm_dflash.training.sequences import Sample, Sequences

_KEPT_BY_THE_TARGET = ("embed_tokens.weight",)
"""Not written: vLLM shares the target's where a head has none."""


class Run:
    """What a DFlash run leaves: its target, its answers and its budget."""

    def __init__(self, folder: Path) -> None:
        try:
            settings = json.loads((folder / "settings.json").read_text())
            shards = json.loads((folder / "generate" / "split.json").read_text())["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(
                f"{folder} is no run of `vllm-dflash train` with answers ({error}): give its --out,"
                " after its stage generate"
            ) from None
        self.target = settings["run"]["target"]
        self.path = smollm2.resolve(self.target)
        config = hub.load_config(self.path)
        self.dtype = hub.resolved_dtype(config, settings["run"]["dtype"])
        self.answers = Sequences(folder / "generate", shards)
        self.held_out = Sequences(folder / "generate" / "held-out", 1)
        table = settings["train"]
        self.batch_size = table["batch_size"]
        lengths, prompts = self.answers.lengths, self.answers.prompt_lengths
        self.plan = Plan(lengths, prompts, self.batch_size, 1, settings["run"]["seed"])
        self.steps = table["steps"] or self.plan.steps(table["epochs"])

    def token_counts(self) -> dict[int, int]:
        """How often each token id occurs in the answers."""
        ids = [s.tokens[s.prompt_length :] for s in map(self.answers.__getitem__, self._numbers)]
        values, counts = np.unique(np.concatenate(ids), return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    @property
    def _numbers(self) -> range:
        return range(len(self.answers))


def build(run: Run, args: argparse.Namespace) -> Eagle3DraftModel:
    """An untrained head of one Llama layer, with the target's embedding, norm and lm_head frozen in
    it."""
    target = hub.load_config(run.path)
    layer = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None),
        hidden_act=target.hidden_act,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=copy.deepcopy(target.rope_parameters),
        initializer_range=target.initializer_range,
        tie_word_embeddings=False,
    )
    size = min(args.draft_vocab or target.vocab_size, target.vocab_size)
    t2d = d2t = None
    if size < target.vocab_size:
        counts = run.token_counts()
        d2t, t2d = build_vocab_mappings_from_distribution(counts, size, target.vocab_size)
        within = sum(count for token, count in counts.items() if t2d[token])
        print(
            f"draft vocabulary: {size} tokens, {within / sum(counts.values()):.2%} of the answers"
        )
    return Eagle3DraftModel.from_training_args(
        verifier_config=layer,
        t2d=t2d,
        d2t=d2t,
        draft_vocab_size=size,
        draft_attn_impl="sdpa",
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
        ttt_steps=args.ttt_steps,
        target_layer_ids=layer_ids(target.num_hidden_layers),
        verifier_name_or_path=run.path,
    )


def layer_ids(layers: int) -> list[int]:
    """EAGLE-3's three layers, as vLLM counts them: id i is what goes into layer i."""
    return [2, layers // 2, layers - 3]


class Cache:
    """Hidden states of training sequences on the disk, bfloat16, each computed when it is first
    trained on."""

    def __init__(self, path: Path, starts: np.ndarray, width: int) -> None:
        count, tokens = len(starts) - 1, int(starts[-1])
        with disk_refusals(path), path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * tokens * width + count)
        self.values = np.memmap(path, np.int16, "r+", count, (tokens, width))
        self.there = np.memmap(path, np.uint8, "r+", 0, (count,))
        self.starts = starts

    def put(self, number: int, hidden: torch.Tensor) -> None:
        """Keeps sequence ``number``'s hidden states [S, width], bfloat16."""
        found = hidden.view(torch.int16).numpy()
        self.values[self.starts[number] : self.starts[number + 1]] = found
        self.there[number] = 1

    def get(self, number: int) -> torch.Tensor:
        """What ``put`` was given."""
        found = np.array(self.values[self.starts[number] : self.starts[number + 1]])
        return torch.from_numpy(found).view(torch.bfloat16)


class Trainer:
    """Head, target and optimizer; ``step`` is a function of the step's number and the weights."""

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.run, self.args, self.head = run, args, build(run, args)
        self.target = hub.load_model(run.path, run.dtype, "cpu", False)
        self.target.requires_grad_(False)
        self.mixed_precision = args.precision == "bfloat16" or (
            args.precision == "auto" and computes_bfloat16(self.target.device)
        )
        layers = self.target.config.num_hidden_layers
        # The last one is before the final norm: the head has that norm itself.
        self.outputs = [i - 1 for i in layer_ids(layers)] + [layers - 1]
        self.cache = None
        if args.cache:
            starts = np.cumsum([0, *run.answers.lengths])
            width = 4 * self.target.config.hidden_size
            self.cache = Cache(args.out / "hidden_states", starts, width)
        config = TrainerConfig(lr=args.lr, num_epochs=1, save_path="", optimizer="adamw")
        [self.optimizer] = build_optimizers(self.head, config)
        self.call, _ = Eagle3DraftModel.get_trainer_kwargs(
            ttt_steps=args.ttt_steps,
            ttt_step_loss_decay=1.0,
            loss_fn="kl_div",
            loss_implementation="eager",
        )

    @torch.no_grad()
    def hidden(self, samples: list[Sample]) -> list[torch.Tensor]:
        """The target's states [S, 4 * H] over each sequence, in its dtype."""
        ids = padded([s.tokens for s in samples])
        found = target_features(self.target, self.outputs, ids, use_cache=False)[0]
        return [row[: len(s.tokens)] for row, s in zip(found, samples, strict=True)]

    def batch(self, rows: list[int]) -> dict[str, Any]:
        """The library's batch of training sequences ``rows``."""
        samples = [self.run.answers[row] for row in rows]
        if self.cache is None:
            return self.pack(samples)
        if not all(self.cache.there[row] for row in rows):
            for row, found in zip(rows, self.hidden(samples), strict=True):
                self.cache.put(row, found.bfloat16())
        return self.pack(samples, [self.cache.get(row) for row in rows])

    def pack(
        self, samples: list[Sample], hidden: list[torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """The library's batch of these sequences: one row, one after the other."""
        if hidden is None:
            hidden = self.hidden(samples)
        width = self.target.config.hidden_size
        batch = []
        for sample, found in zip(samples, hidden, strict=True):
            length = len(sample.tokens)
            batch.append(
                {
                    "hidden_states": found[:, :-width].float(),
                    "verifier_last_hidden_states": found[:, -width:].float(),
                    "input_ids": torch.from_numpy(sample.tokens.astype(np.int64)),
                    "loss_mask": torch.arange(length) >= sample.prompt_length,
                    "lengths": torch.tensor([length]),
                    "position_ids": torch.arange(length),
                }
            )
        room = sum(len(s.tokens) - 1 for s in samples)
        packed = CollateFn(room, width, 3, torch.float32, shift_batch)(batch)
        del packed["error_records"]
        return packed

    def step(self, step: int) -> float:
        """One step; its loss."""
        share = (step + 1) / max(1, round(0.01 * self.run.steps))  # a hundredth of warm-up
        rate = self.args.lr * min(share, (self.run.steps - step) / self.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        packed = self.batch([int(row) for row in self.run.plan.batch(step).rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
            _, loss, _ = self.head(**packed, **self.call)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss of step {step} is not finite: lower --lr, in another --out")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def walk(self) -> dict[int, float]:
        """tau of each draft length K over the held-out prompts' own greedy answers, as decoding
        goes through them: after a draft, on at the token behind the accepted ones.

        A draft token that is right was drafted behind right ones, so what the head says with the
        true tokens before it, as in training, is what it says in decoding.
        """
        steps, emitted = np.zeros(self.args.ttt_steps, int), np.zeros(self.args.ttt_steps, int)
        for number in range(len(self.run.held_out)):
            sample = self.run.held_out[number]
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))
            packed = self.pack([sample])
            del packed["verifier_last_hidden_states"]
            drafts = self.head(**packed, ttt_steps=self.args.ttt_steps)
            ids = torch.cat(drafts)  # [ttt_steps, S - 1]
            if self.head.d2t is not None:
                ids = ids + self.head.d2t[ids]
            # Row t, place j: the token at j + 2 + t.
            places = torch.arange(ids.shape[1]) + 2 + torch.arange(len(ids))[:, None]
            right = ids == tokens[places.clamp(max=len(tokens) - 1)]
            # Past the last place whose draft has a true token for each of its own.
            end = len(tokens) - 1 - self.args.ttt_steps
            for k in range(1, self.args.ttt_steps + 1):
                accepted, at = right[:k].long().cumprod(0).sum(0).tolist(), sample.prompt_length - 1
                while at < end:
                    steps[k - 1] += 1
                    emitted[k - 1] += accepted[at] + 1
                    at += accepted[at] + 1
        return {k + 1: float(emitted[k] / steps[k]) for k in range(self.args.ttt_steps)}

    def save(self, path: Path, done: int) -> None:
        """Writes the checkpoint of the first ``done`` steps in the place of the last."""
        weights = {n: p.detach() for n, p in self.head.named_parameters() if p.requires_grad}
        with whole_file(path) as file:
            torch.save((done, weights, self.optimizer.state_dict()), file)

    def resume(self, path: Path) -> int:
        """Takes over a checkpoint; the steps that are done."""
        if not path.is_file():
            return 0
        done, weights, optimizer = torch.load(path, weights_only=True)
        self.head.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict(optimizer)
        return int(done)


def export(trainer: Trainer, folder: Path) -> None:
    """The head as vLLM serves it, in bfloat16, without the target's embedding."""
    head = copy.deepcopy(trainer.head).to(torch.bfloat16)
    with whole_folder(folder) as new:
        head.save_pretrained(new)
        file, config = new / "model.safetensors", json.loads((new / "config.json").read_text())
        tensors = {n: t for n, t in load_file(file).items() if n not in _KEPT_BY_THE_TARGET}
        file.write_bytes(save(tensors, {"format": "pt"}))
        # transformers adds the library's source to read the config with; vLLM reads it by itself.
        (new / "config.py").unlink(missing_ok=True)
        config.pop("auto_map", None)
        # A name, and no folder of this machine.
        config["speculators_config"]["verifier"]["name_or_path"] = trainer.run.target
        put(new / "config.json", json.dumps(config, indent=2) + "\n")


def cut(log: Path, done: int) -> None:
    """Leaves the rows of the first ``done`` steps."""
    lines = log.read_text().splitlines() if log.is_file() else []
    put(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= done))


def train(run: Run, args: argparse.Namespace) -> None:
    """Runs the training, or the rest of it, and writes the head."""
    names = ("draft_vocab", "ttt_steps", "lr", "seed", "precision", "cache")
    settings = {name: getattr(args, name) for name in names}
    budget = {"steps": run.steps, "batch_size": run.batch_size, "sequences": len(run.answers)}
    claim(args.out, "eagle3", settings | budget | {"target": smollm2.exact(run.target)})
    trainer = Trainer(run, args)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    start, began, losses = trainer.resume(checkpoint), time.monotonic(), []
    cut(log, start)
    with Progress(total=run.steps, initial=start, desc="eagle3", unit=" steps") as bar:
        for step in range(start, run.steps):
            losses.append(trainer.step(step))
            done = step + 1
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(1)
            if done % args.log_every == 0 or done == run.steps:
                seconds = (time.monotonic() - began) / (done - start)
                mean = sum(losses[-args.log_every :]) / len(losses[-args.log_every :])
                with log.open("a") as file:
                    row = {"step": done, "loss": mean, "seconds_a_step": seconds}
                    file.write(json.dumps(row) + "\n")
            if done % args.checkpoint_every == 0 or done == run.steps:
                trainer.save(checkpoint, done)
    with torch.no_grad():
        for weight in trainer.head.parameters():
            weight.copy_(weight.bfloat16())  # as it is exported
    taus = trainer.walk()
    lengths = run.answers.lengths
    tokens = sum(int(lengths[run.plan.batch(s).rows].sum()) for s in range(run.steps))
    write_record(args.out / "result.json", budget | {"tokens": tokens, "tau": taus})
    export(trainer, args.out / "head")
    shown = ", ".join(f"{tau:.2f} with K = {k}" for k, tau in taus.items())
    print(f"{args.out / 'head'}: {tokens} tokens seen; tau {shown}")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of `vllm-dflash train`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draft-vocab", type=int, default=16384, help="0: all of the target's")
    parser.add_argument("--ttt-steps", type=int, default=5, help="draft positions trained on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--cache", action="store_true", help="hidden states are computed once")
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=10)
    args = parser.parse_args()
    train(Run(args.run), args)


if __name__ == "__main__":
    main()

"""Stage three: the drafter learns. Resumes from its newest checkpoint and ends with the weights of
a run that was never stopped.

vllm-dflash train ... --only train          pytest tests/unit/test_train_resume.py
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.acceptance import tau
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import checksum, claim, whole_folder, write_record
from vllm_dflash.progress import Progress
from vllm_dflash.reference.checkpoint import save_drafter
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.reference.masks import context_mask
from vllm_dflash.training import checkpoints, draft_vocab, flex, sharding
from vllm_dflash.training.batches import Batch, Plan, forward_size
from vllm_dflash.training.drafter import first_weights, with_weights
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.features import Features, padded
from vllm_dflash.training.generate import held_out, sequences
from vllm_dflash.training.learned import final_folder, folder_of, inputs, result_path
from vllm_dflash.training.logs import Log, plot
from vllm_dflash.training.objective import Objective, denominator, weights_at
from vllm_dflash.training.optimizer import Optimizer, computes_bfloat16, learning_rate
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.stopping import OverError, Stopping
from vllm_dflash.training.target import Target
from vllm_dflash.training.walk import Estimate, estimate
from vllm_dflash.training.workers import Workers

_LENGTHS = 64
"""Batches are padded to a multiple of so many tokens: compiled code then meets few lengths."""


class Trainer:
    """One worker's state of the stage."""

    def __init__(
        self, settings: Settings, config: DrafterConfig, target: Target, model: Any
    ) -> None:
        self.settings, self.table, self.config, self.target, self.model = (
            settings,
            settings.train,
            config,
            target,
            model,
        )
        self.workers, self.data = Workers.current(), sequences(settings)
        try:
            self.plan = Plan(
                self.data.lengths,
                self.data.prompt_lengths,
                self.table.batch_size,
                self.table.anchors,
                settings.run.seed,
            )
        except ValueError as error:
            raise TrainingError(
                f"{error}: generate longer answers (--response-tokens, --ignore-eos)"
            ) from None
        self.steps = self.table.steps or self.plan.steps(self.table.epochs)
        self.features = Features(settings, self.data, config, target, model)
        drafter = first_weights(config, settings, model).to(model.device).train()
        if config.draft_vocab_size is not None:
            self._own_vocabulary(drafter, config.draft_vocab_size)
        on_cuda = model.device.type == "cuda"
        blocks: Callable[..., Any] = context_mask
        if self.table.attention == "flex" or (
            self.table.attention == "auto" and on_cuda and not config.sliding_windows
        ):
            flex.use(drafter)
            blocks = flex.block_mask
        self.mixed_precision = self.table.precision == "bfloat16" or (
            self.table.precision == "auto" and computes_bfloat16(model.device)
        )
        dtype = None if self.mixed_precision else torch.float32
        objective = Objective(model, drafter, self.table, blocks, dtype)
        self.sharded = self.table.parallel == "fsdp" and self.workers.count > 1
        if self.sharded:
            sharding.shard(objective, model.device)
        self.drafter, self.optimizer = drafter, Optimizer(drafter, self.table, self.steps)
        self.objective = torch.compile(objective) if self.table.compile else objective
        self.skipped = self.bad_in_a_row = 0
        self.recent: list[list[float]] = []
        self.began = time.monotonic()

    def _own_vocabulary(self, drafter: Drafter, size: int) -> None:
        """Gives the drafter its draft vocabulary, unless what it was begun from has one."""
        ids, vocab = drafter.own.draft_ids, self.config.vocab_size
        if ids is None:
            ids = draft_vocab.most_frequent(self.data, size, vocab)
            drafter.own = draft_vocab.own_tables(ids, self.config, self.model)
        else:
            drafter.own = drafter.own.on(self.model.lm_head.weight)
        if self.workers.first:
            share = draft_vocab.covered(self.data, ids, vocab)
            # Held-out answers go on past their end. Of few answers the vocabulary holds all, and
            # of others much less: each token that it lacks ends a draft.
            others = draft_vocab.covered(
                held_out(self.settings), ids, vocab, self.target.eos_token_id
            )
            print(
                f"draft vocabulary: {size} of {vocab} tokens, {share:.2%} of the answers',"
                f" {others:.2%} of the held-out answers'"
            )

    @property
    def seconds(self) -> float:
        """Of training so far, those of stopped processes up to their last checkpoint among them."""
        return time.monotonic() - self.began

    def resume(self) -> int:
        """Takes over the newest checkpoint; the number of steps that are done."""
        device = "cpu" if self.sharded else str(self.model.device)
        found = checkpoints.load_newest(folder_of(self.settings) / "checkpoints", device)
        if found is None:
            return 0
        step, state = found
        try:
            self.optimizer.load(state)
            self.skipped, self.bad_in_a_row, self.recent = (
                state["skipped"],
                state["bad_in_a_row"],
                state["recent"],
            )
            self.began -= state["seconds"]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"the checkpoint of step {step} in {folder_of(self.settings) / 'checkpoints'} is"
                f" whole, but not of this training ({error!r}): go on with the version of"
                " vllm-dflash that wrote it, or remove the folder to train anew"
            ) from None
        return step

    def save(self, step: int) -> None:
        """Writes the checkpoint of the first ``step`` steps: the first of several workers, all of
        which must call it."""
        state = sharding.whole(self.optimizer.state())
        if self.workers.first:
            counts = {
                "skipped": self.skipped,
                "bad_in_a_row": self.bad_in_a_row,
                "recent": self.recent,
                "seconds": self.seconds,
            }
            checkpoints.save(folder_of(self.settings) / "checkpoints", step, state | counts)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step, counted from 0: this worker's forwards, the sum over all, the
        update."""
        batch = self.plan.batch(step)
        gamma_weights = weights_at(self.table, self.config, step, self.steps)
        lengths = self.data.lengths[batch.rows]
        whole = denominator(
            batch,
            lengths,
            self.config.block_size,
            None if self.table.weighting == "dpace" else gamma_weights,
        )
        share = self.table.batch_size // self.workers.count
        size = self.table.micro_batch or forward_size(share, batch.anchors.shape[1], self.config)
        sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for start in range(
            self.workers.rank * size, self.table.batch_size, self.workers.count * size
        ):
            loss, accepted = self._forward(batch.part(start, size), gamma_weights)
            (loss / whole).backward()
            sums += torch.stack([loss.detach() / whole, accepted])
        if not self.sharded:
            self.workers.add_gradients(self.optimizer.parameters)
        loss_value, accepted_value = self.workers.add(sums).tolist()
        norm, good = self.optimizer.step(step, loss_value)
        self.skipped += not good
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        return {
            "loss": loss_value,
            "train_tau": tau(accepted_value, int(batch.exists.sum())) or 1.0,
            "gradient": norm,
        }

    def _forward(self, part: Batch, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.device
        tokens = padded([self.data[int(row)].tokens for row in part.rows], _LENGTHS)
        features = self.features(part.rows.tolist(), tokens)
        lengths = torch.from_numpy(self.data.lengths[part.rows])
        rest = [
            t.to(device)
            for t in (
                tokens,
                lengths,
                torch.from_numpy(part.anchors),
                torch.from_numpy(part.exists),
                weights,
            )
        ]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision):
            loss, accepted = self.objective(features, *rest)
        return loss, accepted

    def as_exported(self) -> Drafter:
        """A copy with the weights that are exported, rounded as on disk, in the dtype that the
        target runs in; all workers must call it."""
        weights = sharding.whole(self.optimizer.weights())
        drafter: Drafter = with_weights(self.config, weights).to(self.model.device)
        dtype = getattr(torch, self.target.dtype)
        drafter.own = draft_vocab.rounded(self.drafter.own, self.config, dtype)
        return drafter.to(getattr(torch, self.config.dtype)).to(dtype).eval()

    def limit(self, steps: int) -> None:
        """There are to be so many steps in all, from here on."""
        self.steps = self.optimizer.steps = steps

    def measure(
        self, drafter: Drafter, prompts: int, look: Callable[[], None] | None = None
    ) -> Estimate:
        """tau on the first held-out prompts, by walking through the target's own answers; ``look``
        is called after each, and may raise."""
        answers = held_out(self.settings)
        chosen = [
            (answers[i].tokens.tolist(), answers[i].prompt_length)
            for i in range(min(prompts, len(answers)))
        ]
        with Progress(total=len(chosen), desc="held-out tau", unit=" prompts", leave=False) as bar:

            def tick() -> None:
                bar.update()
                if look is not None:
                    look()

            return estimate(
                self.model,
                drafter,
                chosen,
                self.settings.prove.prove_tokens,
                self.target.eos_token_id,
                tick,
            )


def train(
    settings: Settings,
    config: DrafterConfig,
    target: Target,
    model: Any,
    minutes: float | None = None,
) -> None:
    """Runs the stage, or the rest of it, on this worker; of one worker for ``minutes`` at most, in
    fewer steps where not all fit.

    Raises:
        RunError: as ``files`` and ``checkpoints``, or the loss was not finite for too many steps in
            a row.
        KeyboardInterrupt: it was stopped by Ctrl-C, after a checkpoint.
    """
    trainer, folder = Trainer(settings, config, target, model), folder_of(settings)
    if trainer.workers.first:
        claim(folder, "train", inputs(settings, config, target.dtype))
    trainer.workers.wait()
    start = trainer.resume()
    log = Log(folder, start, trainer.steps) if trainer.workers.first else None
    table = settings.train
    every = table.eval_every or max(1, trainer.steps // 10)
    stopping, most = Stopping(minutes, lambda: trainer.seconds), trainer.steps
    is_alone = trainer.workers.count == 1  # several end together, or not at all
    if start:
        trainer.limit(stopping.steps(start, most, most))
    with (
        stopping.interruptible() if is_alone else nullcontext(),
        Progress(
            total=trainer.steps,
            initial=start,
            desc="train",
            unit=" steps",
            disable=not trainer.workers.first,
        ) as bar,
    ):
        done = start
        while done < trainer.steps:
            found = trainer.step(done)
            done += 1
            if trainer.bad_in_a_row >= table.max_bad_steps:
                raise TrainingError(
                    f"the loss was not finite for {trainer.bad_in_a_row} steps in a row, up to step"
                    f" {done}: lower --lr, or train with --precision float32; the checkpoints in"
                    f" {folder / 'checkpoints'} are from before"
                )
            trainer.recent.append([found["loss"], found["train_tau"]])
            trainer.limit(stopping.steps(done, trainer.steps, most))
            bar.update()
            bar.set_postfix_str(
                f"loss {found['loss']:.3f} tau {found['train_tau']:.2f}"
                + (f" skipped {trainer.skipped}" if trainer.skipped else "")
            )
            if log is not None and (done % table.log_every == 0 or done == trainer.steps):
                _log_step(log, trainer, done, found)
            if done % every == 0 and done < trainer.steps:
                _measure(trainer, log, done, stopping)
                trainer.limit(stopping.steps(done, trainer.steps, most))
            if done % table.checkpoint_every == 0 or done == trainer.steps or stopping.interrupted:
                trainer.save(done)
            if stopping.interrupted:
                raise KeyboardInterrupt
    if trainer.steps < most:
        print(f"{trainer.steps} of {most} steps: the {minutes:g} minutes are over")
    drafter = trainer.as_exported()
    if log is not None:
        _finish(trainer, drafter, log, folder)


def _measure(trainer: Trainer, log: Log | None, done: int, stopping: Stopping) -> None:
    """Logs tau on the way, where there is time for it."""
    drafter = trainer.as_exported()
    if log is not None:
        with suppress(OverError):
            found = trainer.measure(drafter, trainer.table.eval_prompts, stopping.look)
            log.write(done, held_out_tau=found.tau, held_out_tau_everywhere=found.everywhere)


def _log_step(log: Log, trainer: Trainer, done: int, found: dict[str, float]) -> None:
    """Means of the steps since the last entry."""
    finite = [pair for pair in trainer.recent if math.isfinite(pair[0])]
    loss, tau = (
        (sum(column) / len(finite) for column in zip(*finite, strict=True))
        if finite
        else (None, None)
    )
    trainer.recent = []
    log.write(
        done,
        loss=loss,
        train_tau=tau,
        gradient=found["gradient"] if math.isfinite(found["gradient"]) else None,
        lr=learning_rate(trainer.table, done - 1, trainer.steps),
        epoch=trainer.plan.epoch(done),
        skipped=trainer.skipped,
        seconds=round(trainer.seconds, 1),
    )


def _finish(trainer: Trainer, drafter: Drafter, log: Log, folder: Path) -> None:
    """The last measurement, the plot, the drafter in its folder, and the note that says that all is
    there."""
    settings, table = trainer.settings, trainer.table
    measured = trainer.measure(drafter, settings.prove.prove_prompts)
    log.write(trainer.steps, held_out_tau=measured.tau, held_out_tau_everywhere=measured.everywhere)
    log.close()
    plot(log.path, folder / "curves.svg")
    with whole_folder(final_folder(settings)) as part:
        save_drafter(part, drafter.to(getattr(torch, trainer.config.dtype)))
        files = {path.name: checksum(path) for path in sorted(part.iterdir())}
    write_record(
        result_path(settings),
        {
            "tau": measured.tau,
            "tau_everywhere": measured.everywhere,
            "drafts": measured.acceptance.drafts,
            "per_position": measured.acceptance.per_position,
            "prompts": min(settings.prove.prove_prompts, len(held_out(settings))),
            "steps": trainer.steps,
            "epochs": trainer.plan.epoch(trainer.steps),
            "blocks": trainer.steps * table.batch_size * trainer.plan.anchors,
            "skipped": trainer.skipped,
            "files": files,
        },
    )
    print(
        f"trainer's tau on held-out prompts: {measured.tau:.2f} as decoded"
        f" ({measured.everywhere:.2f} as a mean over all places)"
    )

"""What a refresh measures in plain PyTorch: tau of a drafter prompt by prompt, by the trainer's own
walk, and how many of the trainer's steps go into its budget.

    pytest tests/unit/test_follow_refresh.py
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.progress import Progress
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.training import pipeline, target
from vllm_dflash.training.generate import held_out
from vllm_dflash.training.loop import Trainer
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.walk import accepted_everywhere, walk

_STEPS_FOR_PACE = 4
_UNTIMED = 1
"""Steps of them that are not timed: the first one fetches memory and compiles."""


class Measure:
    """Holds the target's model."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._target, self._config, _ = pipeline.plan(settings)
        self._model: Any = target.load_target(self._target, self.settings, target.device())

    @torch.inference_mode()
    def counts(self, drafter: Path) -> list[list[int]]:
        """Of each held-out prompt the drafts, and their accepted tokens, that decoding it greedily
        with this drafter would count.

        Raises:
            RunError: the held-out prompts are not answered yet.
            DrafterConfigError: the drafter cannot be read.
        """
        loaded = load_drafter(drafter, getattr(torch, self._target.dtype)).to(self._model.device)
        answers, found = held_out(self.settings), []
        for i in Progress(range(len(answers)), desc=f"tau of {drafter.name}", unit=" prompts"):
            tokens, length = answers[i].tokens.tolist(), answers[i].prompt_length
            accepted = walk(
                accepted_everywhere(self._model, loaded, tokens, length),
                tokens,
                length,
                self.settings.prove.prove_tokens,
                self._target.eos_token_id,
            ).accepted
            found.append([len(accepted), sum(accepted)])
        return found

    def steps_in(self, minutes: float) -> tuple[int, int]:
        """Steps of training in so many minutes, by a few that are thrown away, and in the settings'
        ``epochs``; one at least of each."""
        table = dataclasses.replace(self.settings.train, steps=1000)
        chosen = dataclasses.replace(self.settings, train=table)
        trainer, times = Trainer(chosen, self._config, self._target, self._model), []
        for step in range(_STEPS_FOR_PACE):
            began = time.perf_counter()
            trainer.step(step)
            if self._model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        in_time = max(1, int(60 * minutes / statistics.median(times[_UNTIMED:])))
        return in_time, trainer.plan.steps(table.epochs)

    def steps_for(self, tokens: int) -> int:
        """Steps that learn from so many drafted tokens, one at least."""
        table, drafted = self.settings.train, max(1, self._config.block_size - 1)
        return max(1, tokens // (table.batch_size * table.anchors * drafted))

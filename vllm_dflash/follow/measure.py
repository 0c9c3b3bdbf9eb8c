"""What a refresh measures in plain PyTorch: tau of a drafter prompt by prompt, by the trainer's own
walk, and how long one of the trainer's steps takes.

    pytest tests/unit/test_follow_refresh.py
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.progress import Progress
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.training.generate import held_out
from vllm_dflash.training.loop import Trainer
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.target import Target
from vllm_dflash.training.walk import accepted_everywhere, walk

_STEPS_FOR_PACE = 4
_TRIED = 1
"""Steps of them that are not timed: the first ones fetch memory and compile."""


@torch.inference_mode()
def counts(settings: Settings, target: Target, model: Any, drafter: Path) -> list[list[int]]:
    """Of each held-out prompt the drafts, and their accepted tokens, that decoding it greedily with
    this drafter would count.

    Raises:
        RunError: the held-out prompts are not answered yet.
        DrafterConfigError: the drafter cannot be read.
    """
    loaded = load_drafter(drafter, getattr(torch, target.dtype)).to(model.device)
    answers = held_out(settings)
    found = []
    for i in Progress(range(len(answers)), desc=f"tau of {drafter.name}", unit=" prompts"):
        tokens, length = answers[i].tokens.tolist(), answers[i].prompt_length
        accepted = walk(
            accepted_everywhere(model, loaded, tokens, length),
            tokens,
            length,
            settings.prove.prove_tokens,
            target.eos_token_id,
        ).accepted
        found.append([len(accepted), sum(accepted)])
    return found


def seconds_a_step(settings: Settings, config: DrafterConfig, target: Target, model: Any) -> float:
    """The median of a few of the trainer's steps, which are thrown away."""
    table = dataclasses.replace(settings.train, steps=1000)
    trainer = Trainer(dataclasses.replace(settings, train=table), config, target, model)
    times: list[float] = []
    for step in range(_STEPS_FOR_PACE):
        began = time.perf_counter()
        trainer.step(step)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[_TRIED:])


def steps_in(minutes: float, seconds: float, steps_for: Sequence[int] = (1, 10**9)) -> int:
    """Steps of so many ``seconds`` in ``minutes``, within the limits."""
    least, most = steps_for
    return min(most, max(least, int(60 * minutes / seconds)))

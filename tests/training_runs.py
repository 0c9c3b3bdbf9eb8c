"""Small training runs for the tests: a random target, its greedy answers by the reference loop, and
runs that are killed."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pairs import random_prompts
from targets import FAMILIES, VOCAB
from vllm_dflash.files import RunError, claim
from vllm_dflash.reference.decoding import generate
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.generate import folder_of, held_out_tokens, inputs
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.sequences import shard_path, write_sequences
from vllm_dflash.training.settings import Settings

MASK = 511
SMALL: dict[str, Any] = dict(
    kind="dflash",
    dtype="float32",
    mask_token_id=MASK,
    block_size=4,
    layers=2,
    max_prompt_tokens=69,
    response_tokens=24,
    prove_tokens=20,
    shard_size=8,
    held_out=4,
    prove_prompts=4,
    eval_prompts=2,
    steps=12,
    batch_size=4,
    anchors=6,
    optimizer="muon",
    lr=2e-2,
    checkpoint_every=3,
    log_every=2,
    eval_every=6,
    precision="float32",
    cache=True,
    features_batch=4,
)
"""Flags of a run that takes a second or two."""


def make_target(folder: Path, family: str = "llama") -> Path:
    """A random target that writes one of six tokens, so that a moment's training tells."""
    return FAMILIES[family].make(folder)


def settings(target: Path, prompts: Path, out: Path, **changes: Any) -> Settings:
    """``SMALL`` with changes; ``None`` takes a flag away."""
    flags = SMALL | {"target": str(target), "prompts": (str(prompts),), "out": str(out)} | changes
    return training_settings.load(
        None, {name: value for name, value in flags.items() if value is not None}
    )


def write_prompts(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered_prompts(target: Path, path: Path, count: int, tokens: int = 24) -> Path:
    """Prompts with the target's own greedy answers, of several lengths, so that no engine is needed
    for them."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prompts = random_prompts(count, VOCAB)
    answers = [generate(model, None, p, tokens - i % 9, 0).tokens for i, p in enumerate(prompts)]
    return write_prompts(
        path,
        (
            {"prompt_token_ids": p, "response_token_ids": a}
            for p, a in zip(prompts, answers, strict=True)
        ),
    )


def answer_held_out(chosen: Settings, prompts: list[list[int]]) -> None:
    """Writes the held-out answers as the stage generate does, by the reference loop: greedy, past
    any end token."""
    model = AutoModelForCausalLM.from_pretrained(chosen.run.target, dtype=torch.float32)
    claim(folder_of(chosen), "generate", inputs(chosen, chosen.run.dtype))
    answers = [
        ([*p, *generate(model, None, p, held_out_tokens(chosen), 0).tokens], len(p))
        for p in prompts
    ]
    write_sequences(shard_path(folder_of(chosen) / "held-out", 0), answers)


def held_out_file(path: Path, chosen: int = 4) -> tuple[Path, list[list[int]]]:
    """Held-out prompts in a file of their own; the file and the prompts."""
    prompts = [[2 + i, *p] for i, p in enumerate(random_prompts(chosen, VOCAB))]
    return write_prompts(path, ({"prompt_token_ids": p} for p in prompts)), prompts


def start_child(work: Callable[[], str]) -> tuple[Any, Any]:
    """Starts ``work`` in a forked process, with this one's imports; the process, and a pipe that
    gets its answer or its refusal."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        try:
            theirs.send(work())
        except RunError as error:
            theirs.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    return process, ours


def in_child(work: Callable[[], str]) -> str:
    """``work``'s answer, from a process of its own."""
    process, answer = start_child(work)
    said = answer.recv()
    process.join()
    return str(said)


def run_and_kill(chosen: Settings, stages: tuple[str, ...], before: Path) -> None:
    """Runs the stages in a process that is killed, hard, at the moment that the file ``before``
    would get its name."""

    def at_rename(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]) == str(before):
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> str:
        sys.addaudithook(at_rename)
        return str(run_stages(chosen, stages))

    process, _ = start_child(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"it never came to write {before}"

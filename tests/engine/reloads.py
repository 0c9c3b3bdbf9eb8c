"""Engines whose weights change while they run (``reload_worker.py``): folders with one kind of
weight drawn anew, and what is compared."""

import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import forks
from engine.harness import run_worker
from pairs import random_prompts
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import Draft, replay_drafts

PROMPTS = [prompt[:24] for prompt in random_prompts(3, 512)]
MAX_TOKENS = {"v1": 12, "v2": 3}
WORKER = "reload_worker.py"


def redraw(folder: Path, new: Path, pattern: str, seed: int) -> Path:
    """A copy of a checkpoint whose tensors of this kind are other ones; returns its folder."""
    shutil.copytree(folder, new)
    tensors, generator = (
        load_file(folder / "model.safetensors"),
        torch.Generator().manual_seed(seed),
    )
    names = [name for name in tensors if re.search(pattern, name)]
    for name in names:
        tensor = tensors[name]
        if name == "d2t":
            ids = torch.randperm(512, generator=generator)[: len(tensor)].sort().values
            tensors[name] = ids - torch.arange(len(ids))
        elif "norm" in name:
            tensors[name] = torch.empty_like(tensor).uniform_(0.3, 1.7, generator=generator)
        else:
            scale = 0.5 if name.endswith("bias") else float(tensor.std())
            tensors[name] = torch.empty_like(tensor).normal_(0, scale, generator=generator)
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    mask = new / "mask_embedding.pt"
    if mask.exists() and re.search(pattern, "mask_embedding"):
        state = torch.load(mask)
        torch.save(
            state | {"embedding": torch.randn(state["embedding"].shape, generator=generator)}, mask
        )
        names.append("mask_embedding")
    assert names, f"{folder} has no tensor of {pattern}"
    return new


def job(
    target: Path,
    drafter: Path | None,
    steps: Sequence[dict[str, Any]],
    runner: str = "v1",
    **engine_args: Any,
) -> dict[str, Any]:
    return {
        "target": str(target),
        "drafter": drafter and str(drafter),
        "steps": [{k: str(v) if isinstance(v, Path) else v for k, v in s.items()} for s in steps],
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS[runner],
        "engine_args": engine_args,
    }


def run(jobs: Sequence[dict[str, Any]], runner: str = "v1") -> list[list[dict[str, Any]]]:
    """Each job's reports, one a step, from one new process."""
    if runner == "v1":
        return run_worker(WORKER, jobs)
    return run_worker(WORKER, jobs, {"RUNNER": "v2"}, timeout_s=900, kind=forks.INTERPRETER)


@cache
def _target(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def _drafter(folder: Path) -> Any:
    return load_drafter(folder, torch.float32)


@cache
def _reference(
    target: Path, drafter: Path, sequence: tuple[int, ...], anchors: tuple[int, ...]
) -> list[Draft]:
    """Kept: several ways of changing weights come to the same."""
    return replay_drafts(_target(target), _drafter(drafter), sequence, anchors, 7, 128)


def wrong_drafts(report: dict[str, Any], target: Path, drafter: Path) -> tuple[int, int]:
    """Of one step's drafted tokens, how many are not the reference's for these weights, and how
    many there are."""
    first, wrong, count = min(draft["request"] for draft in report["drafts"]), 0, 0
    for i, prompt in enumerate(PROMPTS):
        sequence = prompt + report["tokens"][i]
        drafts = [
            d
            for d in report["drafts"]
            if d["request"] - first == i and len(prompt) <= d["anchor"] < len(sequence)
        ]
        anchors = tuple(d["anchor"] for d in drafts)
        expected = _reference(target, drafter, tuple(sequence), anchors)
        for draft, theirs in zip(drafts, expected, strict=True):
            assert sequence[draft["anchor"]] == draft["token"]
            wrong += sum(a != b for a, b in zip(draft["draft"], theirs.tokens, strict=False))
            count += len(theirs.tokens)
    return wrong, count

"""A ``vllm-dflash refresh`` of a tiny pair for the tests, with the reference loop in the engine's
place."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training_runs import (
    SMALL,
    answer_held_out,
    answered_prompts,
    held_out_file,
    make_target,
    settings,
    start_child,
)
from vllm_dflash import contents
from vllm_dflash.cli import main
from vllm_dflash.follow.interval import Comparison
from vllm_dflash.reference.decoding import generate
from vllm_dflash.training import learned
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.sequences import write_sequences

Pair = tuple[Path, Path, Path]
"""Target, a drafter that has learned for a moment, and a recorder's folder."""
ROUND = "rounds/0001/round.json"
NOT_OURS = ("steps", "held_out", "prove_prompts", "kind", "block_size")
"""Settings that a refresh decides."""


def as_toml(path: Path, **changes: Any) -> Path:
    """``SMALL`` as a file of settings, without an engine in the proof."""
    values = {**SMALL, "skip_vllm": True, **changes}
    tables: dict[str, list[str]] = {}
    for table, item in training_settings.every_field():
        if item.name in values and item.name not in NOT_OURS:
            text = f"{item.name} = {json.dumps(values[item.name])}"
            tables.setdefault(table, []).append(text)
    path.write_text("".join(f"[{name}]\n" + "\n".join(t) + "\n" for name, t in tables.items()))
    return path


def make_pair(folder: Path) -> Pair:
    target = make_target(folder / "target")
    prompts = answered_prompts(target, folder / "prompts.jsonl", 28)
    held_out, ids = held_out_file(folder / "held-out.jsonl")
    chosen = settings(
        target, prompts, folder / "run", held_out_prompts=str(held_out), steps=2, lr=1e-3
    )
    answer_held_out(chosen, ids)
    run_stages(chosen, ("generate", "features", "train"))
    traffic = folder / "traffic"
    traffic.mkdir()
    (traffic / f"traffic-1-aaaaaa-{contents.of_folder(str(target))}.jsonl").write_text(
        prompts.read_text()
    )
    return target, learned.final_folder(chosen), traffic


def reference_answers(
    chosen: Any, dtype: str, room: int, jobs: list[dict[str, Any]], shown: Any = None
) -> None:
    """In the place of ``training.generate.answer``: greedily, by the reference loop."""
    model = AutoModelForCausalLM.from_pretrained(chosen.run.target, dtype=torch.float32)
    for job in jobs:
        asked = [
            ([*p, *generate(model, None, p, job["sampling"]["max_tokens"], 0).tokens], len(p))
            for p in job["prompts"]
        ]
        write_sequences(Path(job["path"]), [*job["answered"], *asked])


def without_engine(patch: pytest.MonkeyPatch) -> None:
    """And any gain is enough: of eight short answers the interval is wide
    (test_follow_interval.py)."""
    patch.setattr("vllm_dflash.training.generate.answer", reference_answers)
    patch.setattr(Comparison, "is_better", property(lambda compared: compared.gain > 0))


def command(pair: Pair, out: Path, *more: str, **changes: Any) -> list[str]:
    target, drafter, traffic = pair
    out.parent.mkdir(exist_ok=True)
    toml = as_toml(out.with_suffix(".toml"), **changes)
    flags = ["--target", target, "--draft", drafter, "--traffic", traffic, "--out", out]
    budget = [] if "--minutes" in more else ["--tokens", "1080"]
    return ["refresh", str(toml), *map(str, flags), "--held-out", "8", *budget, *more]


def run_undisturbed(pair: Pair, out: Path) -> Path:
    """One that nobody kills, with secrets in its command and its settings; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        without_engine(patch)
        patch.setattr(sys, "argv", ["vllm-dflash", "refresh", "--api-key", "sekret"])
        engine_args = json.dumps({"hf_token": "sekret"})
        assert main(command(pair, out, engine_args=engine_args)) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def kill_at(path: Path, asked: list[str], times: int = 1) -> int:
    """The command in a child that is killed as the file, folder or link would get its name for the
    so manieth time; what the child ended with."""
    left = [times]

    def at_rename(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]) == str(path):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> str:
        sys.addaudithook(at_rename)
        return str(main(asked))

    process, _ = start_child(work)
    process.join()
    return int(process.exitcode)

"""tau of a drafter whose target is fine-tuned, before, after, and as a refresh goes on: one
``vllm-dflash refresh``, whose trainer is asked on the way.

After m of M minutes is after m / M of the steps that the refresh counts its minutes in. Each tau is
of the same held-out prompts, decoded greedily. On the way the learning rate has not come down yet:
a refresh of so few minutes ends higher than its point here.
"""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_engine
from following.made import SETTINGS, finetuned, int8
from following.record import FAILS, HOLDS, OPEN, Lines, told
from vllm_dflash import hub
from vllm_dflash.acceptance import tau
from vllm_dflash.cli import main as command
from vllm_dflash.follow.interval import compare
from vllm_dflash.follow.rounds import Rounds
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.training import loop
from vllm_dflash.training.generate import held_out
from vllm_dflash.training.walk import accepted_everywhere, walk

MARKS = (1.0, 2.0, 5.0, 10.0, 15.0)
TOKENS, BACK = 96, 0.5
"""Tokens that a prompt is answered with, and the share of what was lost that has to come back."""
Counts = list[list[int]]


def counts(model: Any, drafter: Any, answers: Sequence[tuple[list[int], int]], eos: Any) -> Counts:
    """Of each answer, as tokens and the prompt's length, the drafts and their accepted tokens."""
    found = []
    with torch.inference_mode():
        for tokens, length in answers:
            accepted = accepted_everywhere(model, drafter, tokens, length)
            on_the_way = walk(accepted, tokens, length, TOKENS, eos).accepted
            found.append([len(on_the_way), sum(on_the_way)])
    return found


def counts_of(target: Path, prompts: Sequence[list[int]]) -> Counts:
    """The same of the first drafter with a target that answers for itself, in float32."""
    block = json.loads((DRAFTER / "config.json").read_text())["block_size"]
    sampling = {"ignore_eos": True}
    batch = run_engine(target, None, prompts, max_tokens=TOKENS + block, sampling=sampling)[0]
    model = hub.load_model(str(target), "float32", "cpu", False)
    drafter = load_drafter(DRAFTER, torch.float32)
    answers = [(p + new, len(p)) for p, new in zip(prompts, batch.tokens, strict=True)]
    eos = json.loads((target / "config.json").read_text()).get("eos_token_id")
    return counts(model, drafter, answers, eos)


class Watched(loop.Trainer):
    """A trainer that is asked for tau on its way; what it says is for one part at a time."""

    lines: Lines
    minutes: float
    prompts: Path
    at = "answers of the target, and tau of the old drafter"

    def step(self, step: int) -> dict[str, float]:
        if not self.prompts.exists():  # the round removes its own
            texts = [s.tokens.tolist()[: s.prompt_length] for s in self._held_out()]
            self.prompts.write_text(json.dumps(texts))
        began = time.perf_counter()
        found = super().step(step)
        took, done = time.perf_counter() - began, step + 1
        minutes = self.minutes * done / self.steps
        Watched.at = f"step {done} of {self.steps}, {minutes:.1f} minutes, {took:.2f} s a step"
        for mark in (*(m for m in MARKS if m < self.minutes), self.minutes):
            if max(1, round(self.steps * mark / self.minutes)) == done:
                self._mark(mark, done)
        return found

    def _held_out(self) -> list[Any]:
        answers = held_out(self.settings)
        return [answers[i] for i in range(len(answers))]

    def _mark(self, mark: float, done: int) -> None:
        if self.lines.of(state="refresh", minutes=mark):
            return
        answers = [(s.tokens.tolist(), s.prompt_length) for s in self._held_out()]
        found = counts(self.model, self.as_exported(), answers, self.target.eos_token_id)
        self.lines.add(state="refresh", minutes=mark, steps=done, counts=found)
        print(f"  {mark:g} minutes, {done} steps: tau {_tau(found):.3f}", flush=True)


def run(
    out: Path, lines: Lines, minutes: float, steps: int, held_out: int, quantized: bool
) -> None:
    """Measures what is not in ``lines`` yet, on so many held-out prompts."""
    made = finetuned(out, steps)
    target = int8(made / "target", out / f"int8-{steps}") if quantized else made / "target"
    name = f"{'quantized' if quantized else 'curve'}-{minutes:g}"
    Watched.lines, Watched.minutes = lines, minutes
    Watched.prompts = out / f"{name}-prompts.json"
    if not lines.of(state="refresh", minutes=minutes) or not lines.of(state="decision"):
        flags = ["--target", str(target), "--prompts", str(made / "prompts.jsonl")]
        flags += ["--held-out", str(held_out), "--minutes", str(minutes)]
        _refresh(out / f"{name}-refreshed", flags, lines)
    prompts = json.loads(Watched.prompts.read_text())
    todo = {"before": (TARGET, prompts), "own text": (TARGET, held_out_prompts(held_out))}
    if quantized:
        todo["int8 alone"] = (int8(TARGET, out / "int8-first"), prompts)
    for state, (its_target, its_prompts) in todo.items():
        if not lines.of(state=state):
            lines.add(state=state, counts=counts_of(its_target, its_prompts))


def _refresh(out: Path, flags: list[str], lines: Lines) -> None:
    flags = [*flags, "--draft", str(DRAFTER), "--dtype", "float32"]
    from vllm_dflash.follow import measure  # noqa: F401 - whose trainer is not to be the watched one

    trainer, loop.Trainer = loop.Trainer, Watched
    try:
        with told(lambda: Watched.at):
            status = command(["refresh", str(SETTINGS), *flags, "--out", str(out)])
    finally:
        loop.Trainer = trainer
    notes = Rounds(out).all()[-1].notes()
    if "decision" not in notes:
        raise SystemExit(f"the refresh ended with {status}: the same command goes on")
    lines.add(state="after", counts=notes["old"])
    lines.add(state="decision", decision=notes["decision"], line=notes["line"])


def _tau(found: Counts) -> float:
    value = tau(sum(c[1] for c in found), sum(c[0] for c in found))
    assert value is not None
    return value


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured: tau of each state; of the refresh's, what it gained over ``after``, half
    of that's interval, and the share of what was lost that came back."""
    by = {row["state"]: row["counts"] for row in rows if "counts" in row}
    found = [
        {"state": state, "minutes": None, "tau": _tau(by[state])}
        for state in ("own text", "before", "int8 alone", "after")
        if state in by
    ]
    lost = _tau(by["before"]) - _tau(by["after"]) if {"before", "after"} <= by.keys() else 0.0
    marks = [row for row in rows if row["state"] == "refresh"] if "after" in by else []
    for row in sorted(marks, key=lambda r: r["minutes"]):
        compared = compare(by["after"], row["counts"])
        each = {"state": "refresh", "minutes": row["minutes"], "tau": compared.new}
        each |= {"steps": row["steps"], "gain": compared.gain, "half": compared.half}
        if lost > 0:
            each |= {"back": compared.gain / lost, "back_half": compared.half / lost}
        found.append(each)
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured, and whether half of what was lost came back."""
    found, lines = table(rows), []
    for row in found:
        at = "" if row["minutes"] is None else f" of {row['minutes']:g} minutes"
        more = ""
        if "gain" in row:
            more = f", {row['gain']:+.3f} +- {row['half']:.3f}"
        if "back" in row:
            more += f", {row['back']:.0%} +- {row['back_half']:.0%} of what was lost came back"
        lines.append(f"      {row['state']}{at}: tau {row['tau']:.3f}{more}")
    lines += [f"      {row['decision']}: {row['line']}" for row in rows if "decision" in row]
    if found and "back" in (last := found[-1]):
        state = HOLDS if last["back"] >= BACK else FAILS
        if state == FAILS and last["back"] + last["back_half"] >= BACK:
            state = OPEN
        lines.append(f"{state} {last['back']:.0%} of what was lost is back, asked {BACK:.0%}")
    return lines


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The table as ``path``.csv and .json, and as a plot, .png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = table(rows)
    names = ["state", "minutes", "steps", "tau", "gain", "half", "back", "back_half"]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(found)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    levels = {row["state"]: row["tau"] for row in found if row["minutes"] is None}
    marks = [row for row in found if row["minutes"] is not None]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    after = [levels["after"]] if "after" in levels else []
    at = [0.0] * len(after) + [row["minutes"] for row in marks]
    half = [0.0] * len(after) + [row["half"] for row in marks]
    taus = after + [row["tau"] for row in marks]
    axes.errorbar(at, taus, yerr=half, marker="o", markersize=5, capsize=2, color="C0")
    for i, (state, value) in enumerate(levels.items(), 1):
        axes.axhline(value, color=f"C{i}", linestyle=":", linewidth=1.2, label=state)
    axes.set_title("tau of the old drafter, and as a refresh goes on", fontsize=10)
    axes.set_xlabel("minutes of training")
    axes.set_ylim(bottom=1)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=120)

"""tau of a drafter whose target is fine-tuned, before, after, and as a refresh goes on: one
``vllm-dflash refresh``, whose trainer is asked on the way.

After m of M minutes is after m / M of the steps that the refresh counts its minutes in; it ends
sooner where that would be more passes over its answers than it makes. Each tau is of the same
held-out prompts, decoded greedily. On the way the learning rate has not come down yet: a refresh of
so few minutes ends higher than its point here.
"""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_engine
from following.made import SETTINGS, finetuned, int8
from following.plot import plot
from following.record import FAILS, HOLDS, OPEN, Lines, told
from following.share import share
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
STATES = ("own text", "before", "int8 alone", "after")
REFERENCES = (("before", "", True), ("own text", "own_", False))
"""From where it was lost: the state, its columns' prefix, and whether its prompts are those of
``after``."""
LOST = {"": "lost on the same prompts", "own_": "lost against its own text"}
NAMES = ["state", "minutes", "steps", "tau", "lost", "lost_half", "gain", "half"]
NAMES += [f"{prefix}back{end}" for _, prefix, _ in REFERENCES for end in ("", "_low", "_high")]
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
        a_minute = self.lines.of(state="pace")[-1]["steps"] / self.minutes
        at = f"step {done} of {self.steps}, {done / a_minute:.1f} minutes, {took:.2f} s a step"
        Watched.at, last = at, round(self.steps / a_minute, 2)
        for mark in (*(m for m in MARKS if m < last), last):
            if (self.steps if mark == last else max(1, round(a_minute * mark))) == done:
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
    if not lines.of(state="decision"):
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
    from vllm_dflash.follow.measure import Measure  # whose trainer is not to be the watched one

    steps_in = Measure.steps_in

    def noted(measure: Measure, minutes: float) -> tuple[int, int]:
        found = steps_in(measure, minutes)
        lines.add(state="pace", steps=found[0])
        return found

    with pytest.MonkeyPatch.context() as patch, told(lambda: Watched.at):
        patch.setattr(loop, "Trainer", Watched)
        patch.setattr(Measure, "steps_in", noted)
        status = command(["refresh", str(SETTINGS), *flags, "--out", str(out)])
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
    """What was measured: tau of each state, and how far ``after`` is below it, as ``lost``; of the
    refresh's, what it gained over ``after``, and the share of what was lost that came back
    (``own_``: against the drafter's own text), each with its interval."""
    by = {row["state"]: row["counts"] for row in rows if "counts" in row}
    found: list[dict[str, Any]] = [
        {"state": state, "minutes": None, "tau": _tau(by[state])} for state in STATES if state in by
    ]
    if "after" not in by:
        return found
    after, levels = by["after"], {row["state"]: row for row in found}
    references = [each for each in REFERENCES if each[0] in by]
    marks = [row for row in rows if row["state"] == "refresh"]
    for state, _, paired in references:
        lost = share(by[state], after, after, paired=paired)
        levels[state] |= {"lost": lost.lost, "lost_half": lost.lost_half}
    for row in sorted(marks, key=lambda r: r["minutes"]):
        compared = compare(after, row["counts"])
        each = {"state": "refresh", "minutes": row["minutes"], "tau": compared.new}
        each |= {"steps": row["steps"], "gain": compared.gain, "half": compared.half}
        for state, prefix, paired in references:
            back = share(by[state], after, row["counts"], paired=paired)
            if back.back is not None:
                names = (f"{prefix}back", f"{prefix}back_low", f"{prefix}back_high")
                each |= dict(zip(names, (back.back, back.low, back.high), strict=True))
        found.append(each)
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured, and whether half of what was lost came back: open where what was lost, or
    the share of it, is not told apart by its interval."""
    found, lines = table(rows), []
    for row in found:
        at = "" if row["minutes"] is None else f" of {row['minutes']:g} minutes"
        more = ""
        if "lost" in row:
            more = f", the fine-tuned target's is {row['lost']:.3f} +- {row['lost_half']:.3f} below"
        if "gain" in row:
            more = f", {row['gain']:+.3f} +- {row['half']:.3f}"
        for _, prefix, _ in REFERENCES:
            if f"{prefix}back" in row:
                more += f", {_share(row, prefix)} of what was {LOST[prefix]} is back"
        lines.append(f"      {row['state']}{at}: tau {row['tau']:.3f}{more}")
    lines += [f"      {row['decision']}: {row['line']}" for row in rows if "decision" in row]
    levels = {row["state"]: row for row in found}
    if "refresh" in levels:
        wanted = [(state, prefix) for state, prefix, _ in REFERENCES if "lost" in levels[state]]
        refused = any(row.get("decision", "kept") != "kept" for row in rows)
        for state, prefix in wanted:
            lines.append(_verdict(levels[state], prefix, found[-1], refused))
    return lines


def _share(row: Mapping[str, Any], prefix: str) -> str:
    back, low, high = (row[f"{prefix}back{end}"] for end in ("", "_low", "_high"))
    return f"{back:.0%} ({low:.0%} to {high:.0%})"


def _verdict(
    reference: Mapping[str, Any], prefix: str, last: Mapping[str, Any], refused: bool
) -> str:
    """Of one measure of what was lost; a drafter that was refused brings nothing back."""
    lost = f"{reference['lost']:.3f} +- {reference['lost_half']:.3f}"
    if f"{prefix}back" not in last:
        said = f"{OPEN} nothing that is told from 0 was {LOST[prefix]}: {lost} of tau"
        return f"{said} (more --held-out narrows it)"
    low, high = last[f"{prefix}back_low"], last[f"{prefix}back_high"]
    state = HOLDS if low >= BACK else FAILS if high < BACK else OPEN
    state = FAILS if refused and state == HOLDS else state
    said = f"{state} {_share(last, prefix)} of what was {LOST[prefix]} ({lost}) is back"
    return f"{said}, asked {BACK:.0%}" + (", and it was refused" if refused else "")


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The table as ``path``.csv and .json, and as a plot, .png."""
    found = table(rows)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(found)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot({"": found}, path.with_suffix(".png"))

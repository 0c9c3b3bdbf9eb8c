"""A study at one budget, in two parts: contexts (DFlash and DFlare, depths, target layers, DFlare's
own projections, the rise of gamma) and heads (three contexts x five heads over the block); several
seeds, with intervals.

Every variant is trained by `vllm-dflash train` on the same answers, for the same number of steps,
on the embedded target; tau is the trainer's on held-out prompts, which is the served one
(docs/train.md). Stopped, it goes on where it was. Drafters to compare in speed are then served
beside each other by `vllm-dflash bench`.

    study=".venv/bin/python examples/matched_budget.py --prompts prompts.jsonl --out /tmp/study"
    $study --list
    $study --part heads --match parameters --seeds 0 1 2
    $study --part heads --match parameters --report
    $study --bench dflash-3x3 dflare-3x5
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matched_report import differences, report
from matched_variants import PARTS, Variant
from tqdm import tqdm

from vllm_dflash.training.settings import Settings, load

PAIR = Path(__file__).resolve().parent / "embedded_pair"


def settings_of(args: argparse.Namespace, variant: Variant, seed: int) -> Settings:
    """The run of a variant and seed."""
    flags = {
        "target": str(PAIR / "target"),
        "prompts": [str(args.prompts)],
        "held_out_prompts": str(PAIR / "prompts.jsonl"),
        "steps": args.steps,
        "out": str(args.out / f"{args.match}-{args.steps}" / f"{variant.name}-seed{seed}"),
        "seed": seed,
        "dtype": args.dtype,
        "prove_prompts": 128,
        "eval_every": args.steps,
        "checkpoint_every": max(25, args.steps // 8),
        "batch_size": args.batch_size,
        "anchors": args.anchors,
        "precision": args.precision,
        "compile": args.compile,
    }
    chosen = load(str(PAIR / "dflash.toml"), flags | variant.flags)
    if args.match == "parameters":
        chosen = load(
            str(PAIR / "dflash.toml"),
            flags | variant.flags | {"intermediate_size": matched_width(chosen)},
        )
    return chosen


def parameters_of(chosen: Settings) -> int:
    """Parameters of the drafter that a run trains; tied projections count once."""
    from vllm_dflash.training.drafter import plan
    from vllm_dflash.training.target import find_target
    from vllm_dflash.weights import expected_tensors

    shapes = expected_tensors(plan(chosen, find_target(chosen))[0])
    return sum(
        _product(s)
        for name, s in shapes.items()
        if not (chosen.drafter.tie_context and "_proj_target" in name)
    )


def matched_width(chosen: Settings) -> int:
    """The MLP's width with which a drafter has the parameters of dflash-3x3, to a multiple of
    16."""
    from dataclasses import replace

    def at(width: int) -> int:
        return parameters_of(
            replace(chosen, drafter=replace(chosen.drafter, intermediate_size=width))
        )

    base = replace(
        chosen.drafter,
        kind="dflash",
        head="argmax",
        head_settings="{}",
        conv_kernel_size=0,
        layers=3,
        target_layer_ids=(1, 3, 5),
        tie_context=False,
        intermediate_size=None,
    )
    wanted, each = parameters_of(replace(chosen, drafter=base)), (at(32) - at(16)) // 16
    return max(16, 16 + (wanted - at(16)) // each // 16 * 16)


def flops_of(chosen: Settings) -> int:
    """Floating-point operations of a draft, as torch counts them: a block, and one token more of
    context."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vllm_dflash.hub import load_model
    from vllm_dflash.reference.checkpoint import new_drafter
    from vllm_dflash.reference.decoding import draft_block
    from vllm_dflash.training.drafter import plan
    from vllm_dflash.training.target import find_target

    config = plan(chosen, find_target(chosen))[0].with_(dtype="float32")
    target = load_model(chosen.run.target, "float32", "cpu")
    drafter, counter = new_drafter(config), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        context = drafter.context(torch.randn(1, 1, config.num_features * config.hidden_size))
        kept = drafter.context_kv(context, torch.zeros(1, 1, dtype=torch.long))
        before = drafter.before_anchors(context, torch.ones(1, 1, dtype=torch.long))
        before = None if before is None else before[0, 0]
        draft_block(target, drafter, 1, 1, kept, config.block_size, before=before)
    return counter.get_total_flops()


def _product(shape: Sequence[int]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


def train(args: argparse.Namespace, chosen: Settings) -> None:
    """Trains a run to its end; all share one folder of answers, and those with the same target
    layers one of features."""
    from vllm_dflash.training import features, pipeline
    from vllm_dflash.training.generate import folder_of

    answers, mine = args.out / "answers", folder_of(chosen)
    if not mine.exists():
        first = load(
            str(PAIR / "dflash.toml"),
            {
                "target": chosen.run.target,
                "prompts": chosen.data.prompts,
                "held_out_prompts": chosen.data.held_out_prompts,
                "out": str(answers),
                "dtype": chosen.run.dtype,
            },
        )
        pipeline.run_stages(first, ("generate",))
        shutil.rmtree(mine.with_name("generate.part"), ignore_errors=True)
        shutil.copytree(
            answers / "generate", mine.with_name("generate.part"), copy_function=os.link
        )
        # Greedy answers do not depend on the seed, which the folder names.
        inputs = mine.with_name("generate.part") / "inputs.json"
        found = json.loads(inputs.read_text()) | {"seed": chosen.run.seed}
        inputs.unlink()
        inputs.write_text(json.dumps(found))
        mine.with_name("generate.part").rename(mine)
    shared = args.out / f"features-{'-'.join(map(str, chosen.drafter.target_layer_ids or ()))}"
    cached = features.folder_of(chosen)
    if shared.exists() and not cached.exists():
        _linked(shared, cached)
    pipeline.run_stages(chosen, ("features",))
    if not shared.exists():
        _linked(cached, shared)
    pipeline.run_stages(chosen, ("train",))
    shutil.rmtree(cached)


def _linked(source: Path, out: Path) -> None:
    """A folder of links to the files of another, whole or not there."""
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, copy_function=os.link)
    part.rename(out)


def note(args: argparse.Namespace, variant: Variant, seed: int, run: Settings) -> None:
    """Adds a finished run to the file of results, a line."""
    found = _read(Path(run.run.out) / "train" / "result.json")
    line = _budget(args) | {
        "variant": variant.name,
        "seed": seed,
        "tau": found["tau"],
        "parameters": parameters_of(run),
        "seconds_a_step": _step_seconds(run),
    }
    with _results(args).open("a") as file:
        file.write(json.dumps(line) + "\n")


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of runs with this budget."""
    lines = _results(args).read_text().splitlines() if _results(args).is_file() else []
    budget = _budget(args)
    return [line for line in map(json.loads, lines) if budget.items() <= line.items()]


def tables(args: argparse.Namespace, chosen: Sequence[Variant]) -> str:
    """What is trained so far of these variants: the table of means, and that of differences."""
    names = {v.name for v in chosen}
    runs = [run for run in finished(args) if run["variant"] in names]
    found = {run["variant"] for run in runs}
    flops = {v.name: flops_of(settings_of(args, v, 0)) for v in chosen if v.name in found}
    what = (
        f"{args.steps} steps of {args.batch_size} sequences x {args.anchors} blocks, matched by"
        f" {args.match}; tau on 128 held-out prompts x 192 tokens, greedy, {args.dtype}"
    )
    return f"{what}\n\n{report(runs, flops)}\n{differences(runs)}"


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """What results have to have in common to be compared."""
    return {
        name: getattr(args, name)
        for name in ("match", "steps", "batch_size", "anchors", "dtype", "precision")
    }


def _results(args: argparse.Namespace) -> Path:
    return args.results or args.out / "results.jsonl"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _step_seconds(run: Settings) -> float:
    """Median over the log's stretches: the slowest are other work's."""
    path = Path(run.run.out) / "train" / "log.jsonl"
    timed = [
        (e["step"], e["seconds"])
        for e in map(json.loads, path.read_text().splitlines())
        if "seconds" in e
    ]
    return statistics.median(
        (s1 - s0) / (n1 - n0) for (n0, s0), (n1, s1) in pairwise(timed) if s1 > s0
    )


def bench(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Serves the first seed's drafters of these names beside plain decoding, in turns."""
    by_name = {v.name: v for v in PARTS[args.part]()}
    folders = {
        n: Path(settings_of(args, by_name[n], args.seeds[0]).run.out) / "train" / "drafter"
        for n in names
    }
    drafts = [part for name, folder in folders.items() for part in ("--draft", f"{name}={folder}")]
    command = [
        sys.executable,
        "-m",
        "vllm_dflash.cli",
        "bench",
        "--target",
        str(PAIR / "target"),
        *drafts,
        "--prompts",
        str(PAIR / "prompts.jsonl"),
        "--methods",
        ",".join(["plain", *(f"dflash@{n}:7" for n in names)]),
        "--out",
        str(args.out / "bench"),
    ]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="JSON lines to train on, from embedded_pair/prompts.py",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--results",
        type=Path,
        help=(
            "a line for each finished run, none of which is done again (default: OUT/results.jsonl)"
        ),
    )
    parser.add_argument(
        "--part", choices=PARTS, default="contexts", help="of the study (default: contexts)"
    )
    parser.add_argument("--steps", type=int, default=400, help="of every run (default: 400)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step (default: 16)")
    parser.add_argument("--anchors", type=int, default=32, help="blocks a sequence (default: 32)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of target, answers and exported drafters (default: bfloat16)",
    )
    parser.add_argument(
        "--precision",
        default="bfloat16",
        help="of the training's matrix products (default: bfloat16)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help=(
            "torch.compile each run's loss: on two cores two minutes once, then half the time a"
            " step"
        ),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--match",
        choices=("steps", "parameters"),
        default="steps",
        help="parameters: MLPs as wide as makes all as large as dflash-3x3",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument(
        "--list", action="store_true", help="print the variants with their parameters, and stop"
    )
    parser.add_argument(
        "--report", action="store_true", help="print the tables of what is trained so far, and stop"
    )
    parser.add_argument("--bench", nargs="+", metavar="NAME", help="serve these, and stop")
    args = parser.parse_args()
    chosen = [v for v in PARTS[args.part]() if not args.only or v.name in args.only]
    if args.list:
        for variant in chosen:
            print(
                f"{variant.name:<20} {parameters_of(settings_of(args, variant, 0)):>10,} parameters"
            )
        return 0
    if args.bench:
        return bench(args, args.bench)
    if args.report:
        print(tables(args, chosen))
        return 0
    began = time.monotonic()
    done = {(one["variant"], one["seed"]) for one in finished(args)}
    todo = [(v, seed) for seed in args.seeds for v in chosen if (v.name, seed) not in done]
    for variant, seed in tqdm(todo, desc="study", unit=" runs"):
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            break
        run = settings_of(args, variant, seed)
        train(args, run)
        note(args, variant, seed, run)
    print(tables(args, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())

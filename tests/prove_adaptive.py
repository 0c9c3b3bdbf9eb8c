"""Adaptive drafting is never slower: what docs/performance.md and issue trackers ask of it,
measured by hand on one machine, with nothing beside it.

    python tests/prove_adaptive.py --part lengths --target random --out /tmp/proof

Parts, and about how many minutes three repeats take on two cores with AMX:
  lengths  adaptive >= 0.97 x plain at 1, 4 and 16 requests, contexts of 128 to 32,768, greedy and
           at temperature 1                                    (--target embedded 25, random 18)
  mixed    one request of 32,768 among seven of 128: >= 0.97 x the best of plain, all drafting, and
           only the short ones drafting                        (--target embedded 6, random 4)
  short    1 to 32 requests, and a load of 1, 32, 1, 32, 1: >= 0.97 x plain and >= native; K = 1,
           3, 5, 7 beside it                                                        (50 to 100)
  random   prompts of tokens by chance, 1, 8 and 32 requests, also at temperature 2        (35)
The embedded pair is given as many positions, `random` is a pair of random weights.

Engines take turns of 0.1 s; a ratio is taken within a repeat. Of lengths and mixed an engine stays
for all cells and has each prompt in its prefix cache; a figure is of decoding alone. The others are
`vllm-dflash bench`, with engines started anew for each repeat, and leave its report too.

What was measured is a line of OUT/PART-TARGET.jsonl after each cell. The same command goes on where
it was interrupted, and without anything left to do it says what was found. Ends with 0 where every
bound holds, 1 where one does not. A bound that lies between the repeats is `open`: more --repeats
decide it.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pairs import make_random_drafter, make_random_target, random_drafter_config  # noqa: E402
from vllm_dflash.cli import parser_of_all  # noqa: E402
from vllm_dflash.engines.process import EngineProcess  # noqa: E402
from vllm_dflash.evaluation.bench import Bench  # noqa: E402
from vllm_dflash.evaluation.job import Engine, Job  # noqa: E402
from vllm_dflash.evaluation.methods import FIXED, Method  # noqa: E402
from vllm_dflash.evaluation.plan import EMBEDDED, Plan, make_plan  # noqa: E402
from vllm_dflash.evaluation.report import write  # noqa: E402
from vllm_dflash.evaluation.starting import engine_settings, start_engines  # noqa: E402
from vllm_dflash.evaluation.statistics import EARLY_STEPS  # noqa: E402
from vllm_dflash.evaluation.summary import BEST_FIXED, BEST_SCHEDULE, rows  # noqa: E402
from vllm_dflash.evaluation.sweep import BASELINE, Record, Sweep  # noqa: E402
from vllm_dflash.evaluation.workload import Lengths, Point, PromptSet  # noqa: E402

LONG, SHORT = 32768, 128
CONTEXTS = (SHORT, 2048, 8192, LONG)
POSITIONS = LONG + 2048
TURN = 0.1
TOKENS = Lengths(64, 192)
TOKEN_BYTES = {"embedded": 5632, "random": 1024}
"""Of a position's keys and values, in target and drafter."""
SHORT_ONLY = "short-only"
"""The method that drafts for the short requests of a mixed batch."""


class Steady(EngineProcess):
    """An ``Engine`` under a load that never changes; see ``steady/steady_engine.py``."""

    def __init__(self, settings: Mapping[str, Any], method: Method, log: Path) -> None:
        path = {"PYTHONPATH": str(HERE / "steady")}
        super().__init__("steady_engine", settings, log, method.environment | path)
        self._leaves_out = method.name == SHORT_ONLY

    def run(
        self, job: Job, on_request: Callable[[], object]
    ) -> Generator[None, None, dict[str, Any]]:
        """See ``Engine``."""
        lengths = [len(prompt) for prompt in job.prompts]
        undrafted = [i for i, n in enumerate(lengths) if n == LONG] if self._leaves_out else []
        given = {"seconds": seconds_of(sum(lengths)), "undrafted": undrafted}
        found: dict[str, Any] = yield from self.slices(asdict(job) | given, lambda _: on_request())
        return found


def seconds_of(num_context: int) -> float:
    """How long a cell is measured in each repeat: long contexts have long steps."""
    return min(3 + 0.75 * num_context / LONG, 15)


@dataclass(frozen=True)
class Part:
    """What is measured, and what has to hold."""

    plan: Plan
    bounds: Mapping[str, float]
    """Of adaptive's tokens a second over a method's."""
    shown: Sequence[str]
    """What else it is compared with."""
    is_steady: bool

    def requests(self, point: Point) -> list[tuple[list[int], int]]:
        """Prompts, and the tokens that they generate."""
        if not self.is_steady:
            return self.plan.requests(point)
        prompts = self.plan.prompt_sets[point.prompt_set]
        found = prompts.take(point.concurrency, point.prompt_tokens)
        # A long one does not end meanwhile.
        tokens = [n if len(p) == SHORT else 1024 for p, n in zip(found, TOKENS.take(len(found)))]
        return list(zip(found, tokens, strict=True))

    def units(self, repeats: int) -> list[list[int]]:
        """Repeats that share their engines."""
        every = list(range(1, repeats + 1))
        return [every] if self.is_steady else [[repeat] for repeat in every]

    def engines(self, stack: ExitStack, logs: Path) -> dict[str, Engine]:
        """By method."""
        logs.mkdir(parents=True, exist_ok=True)
        if not self.is_steady:
            failures: dict[str, Any] = {}
            found = start_engines(self.plan, logs, stack, {}, failures)
            if failures:
                sys.exit(f"not all engines started: {logs} says why")
            return found
        steady: dict[str, Engine] = {}
        for method in self.plan.methods:
            print(f"starting {method.name}", file=sys.stderr)
            settings = engine_settings(self.plan, method)
            engine = stack.enter_context(Steady(settings, method, logs / f"{method.name}.log"))
            engine.wait_until_ready()
            steady[method.name] = engine
        return steady


def models(target: str, out: Path) -> tuple[Path, Path]:
    """The folders of target and drafter with as many positions; made where they are not there."""
    folder = out / "models" / target
    if folder.exists():
        return folder / "target", folder / "dflash"
    with tempfile.TemporaryDirectory(dir=out) as new:
        made = Path(new, "pair")
        if target == "random":
            shape = dict(hidden_size=128, max_position_embeddings=POSITIONS)
            make_random_target(made / "target", num_hidden_layers=2, intermediate_size=256, **shape)
            config = random_drafter_config(
                **shape, num_hidden_layers=2, num_target_layers=2, target_layer_ids=(0, 1)
            )
            make_random_drafter(made / "dflash", config=config)
        else:
            for name in ("target", "dflash"):
                shutil.copytree(EMBEDDED / name, made / name)
                config = json.loads((made / name / "config.json").read_text())
                config["max_position_embeddings"] = POSITIONS
                (made / name / "config.json").write_text(json.dumps(config, indent=2))
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)
    return folder / "target", folder / "dflash"


def bench_plan(*arguments: str) -> Plan:
    """A plan of ``vllm-dflash bench``, in the pair's own dtype of service."""
    every = ["bench", "--slice", str(TURN), "--dtype", "bfloat16", *arguments]
    return make_plan(parser_of_all().parse_args(every))


def steady_part(args: argparse.Namespace) -> Part:
    """Lengths or mixed."""
    target, drafter = models(args.target, args.out.resolve())
    is_mixed, count = args.part == "mixed", "1,16" if args.quick else "1,4,16"
    prompts = ("--prompts", str(EMBEDDED / "prompts.jsonl"))
    cache = {
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": TOKEN_BYTES[args.target] * (2 if is_mixed else 17) * POSITIONS,
    }
    plan = bench_plan(
        *("--target", str(target), "--draft", str(drafter), "--max-model-len", str(POSITIONS)),
        *("--methods", "plain,dflash,adaptive" if is_mixed else "plain,adaptive"),
        *("--temperature", "0" if args.quick else "0,1", "--max-tokens", "1024"),
        *("--concurrency", count, "--num-prompts", count, "--engine-args", json.dumps(cache)),
        *("--prompt-tokens", ",".join(map(str, CONTEXTS[2:] if args.quick else CONTEXTS))),
        *(("--dataset", "random") if args.target == "random" else prompts),
    )
    if not is_mixed:
        return Part(plan, {BASELINE: 0.97}, (), True)
    (given,) = plan.prompt_sets.values()
    lengths = (LONG, *[SHORT] * 7)
    batch = [given.take(i + 1, length)[i] for i, length in enumerate(lengths)]
    name = f"one of {LONG} among {len(lengths) - 1} of {SHORT}"
    temperatures = sorted({point.temperature for point in plan.points})
    fixed = next(method for method in plan.methods if method.kind == FIXED)
    mixed = replace(
        plan,
        prompt_sets={name: PromptSet(name, batch)},
        points=[Point(name, None, t, len(lengths), len(lengths)) for t in temperatures],
        methods=[*plan.methods, replace(fixed, name=SHORT_ONLY)],
    )
    return Part(mixed, {BEST_FIXED: 0.97}, (BASELINE,), True)


def bench_part(args: argparse.Namespace) -> Part:
    """Short contexts, by the benchmark itself."""
    loads = {"short": "1,2,4,8,16,32", "random": "1,8,32"}[args.part]
    fixed = "" if args.quick else "dflash:1,dflash:3,dflash:5,"
    warm = "0,2" if args.part == "random" else "0,1"
    plan = bench_plan(
        *("--methods", f"plain,{fixed}dflash:7,adaptive,native:7"),
        *("--concurrency", "1,32" if args.quick else loads),
        *("--temperature", "0" if args.quick else warm),
        *("--engine-args", json.dumps({"kv_cache_memory_bytes": 1 << 28})),
        *(("--dataset", "random") if args.part == "random" else ()),
        *(("--swing", "1,32,1,32,1") if args.part == "short" else ()),
    )
    bounds = {BASELINE: 0.97, "native:7": 1.0}
    return Part(plan, bounds, (BEST_FIXED, BEST_SCHEDULE), False)


def measure(part: Part, lines: Path, logs: Path, repeats: int, only: str) -> Record:
    """Measures what is not in ``lines`` yet, and adds it; returns all."""
    record, points = Record(), {str(point): i for i, point in enumerate(part.plan.points)}
    if lines.exists():
        for line in lines.read_text().splitlines():
            found = json.loads(line)
            if found["cell"] in points:
                record.runs += [run | {"point": points[found["cell"]]} for run in found["runs"]]
    done = {(run["point"], run["repeat"]) for run in record.runs}
    for unit in part.units(repeats):
        todo = {
            i: missing
            for name, i in points.items()
            if only in name and (missing := [r for r in unit if (i, r) not in done])
        }
        if not todo:
            continue
        with ExitStack() as stack:
            engines = part.engines(stack, logs)
            for i, missing in todo.items():
                point, began = part.plan.points[i], time.monotonic()
                sweep = Sweep([point], [part.requests(point)], TURN)
                sweep.run(engines, missing, lambda _: None)
                if sweep.record.failures:
                    sys.exit(f"{sweep.record.failures}: {logs} says why")
                record.runs += [run | {"point": i} for run in sweep.record.runs]
                told = {"cell": str(point), "ended": datetime.now(UTC).isoformat("T", "seconds")}
                told |= {"minutes": (time.monotonic() - began) / 60, "runs": sweep.record.runs}
                with lines.open("a") as file:
                    file.write(json.dumps(told) + "\n")
                print("\n".join(verdicts(part, record, i)), flush=True)
    return record


def write_report(plan: Plan, record: Record, lines: Path, folder: Path) -> None:
    """The benchmark's own, of all that ``lines`` hold."""
    bench = Bench(plan, sys.argv, folder)
    cells = [json.loads(line) for line in lines.read_text().splitlines()]
    bench.record = record
    seconds = 60 * sum(cell["minutes"] for cell in cells)
    began = datetime.fromisoformat(cells[0]["ended"]) - timedelta(minutes=cells[0]["minutes"])
    folder.mkdir(exist_ok=True)
    when = {"began": began.isoformat("T", "seconds"), "seconds": seconds}
    write(bench.results() | when, folder)


def verdicts(part: Part, record: Record, index: int) -> list[str]:
    """What is found of a cell, a line each; those that do not hold begin with FAILS."""
    methods = part.plan.methods
    found = [row for row in rows(record, len(part.plan.points), methods) if row["point"] == index]
    if not found:
        return []
    own = next(row for row in found if row["method"] == "adaptive")
    lines = [f"{part.plan.points[index]}: adaptive, tau {own['tau'] or 1:.2f}"]
    for label in (*part.bounds, *part.shown):
        against = own["against"].get(label)
        if against is None:
            continue
        spread, bound = against["tokens_per_second"], part.bounds.get(label)
        state = "shown"
        if bound is not None:
            state = "holds" if spread["median"] >= bound else "FAILS"
            if state == "FAILS" and spread["high"] >= bound:
                state = "open"
        base = record.at(index, against["method"])
        each = [
            f"{run['tokens_per_second'] / base[repeat]['tokens_per_second']:.3f}"
            for repeat, run in record.at(index, "adaptive").items()
            if repeat in base
        ]
        what = label if label == against["method"] else f"{label} ({against['method']})"
        asked = "" if bound is None else f", asked {bound:.2f}"
        values = f"  each {' '.join(each)}" if each else ""
        if early := against.get("early_tokens_per_second"):
            values += f", first {EARLY_STEPS} steps {early['median']:.3f}"
        lines.append(f"  {state} {spread['median']:.3f} x {what}{asked}{values}")
    plain = next(row["tokens_per_second"]["median"] for row in found if row["method"] == BASELINE)
    curve = [f"{row['method']} {row['tokens_per_second']['median'] / plain:.2f}" for row in found]
    lines.append(f"  {plain:.0f} tokens/s; over plain's median: {', '.join(curve)}")
    worked = {
        method.name: statistics.median(run["tokens_per_cpu_second"] for run in runs.values())
        for method in methods
        if part.is_steady and (runs := record.at(index, method.name))
    }
    if worked:
        curve = [f"{name} {value / worked[BASELINE]:.2f}" for name, value in worked.items()]
        lines.append(f"  the same by a processor's seconds: {', '.join(curve)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"lengths": steady_part, "mixed": steady_part}
    kinds |= dict.fromkeys(("short", "random"), bench_part)
    parser.add_argument("--part", choices=kinds, required=True)
    parser.add_argument("--target", choices=TOKEN_BYTES, default="embedded", help="of the models")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="a few greedy cells and methods only")
    parser.add_argument(
        "--only", default="", help="cells with this in their name, as it is printed"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of lines, logs and models")
    args = parser.parse_args()
    if args.target == "random" and args.part not in ("lengths", "mixed"):
        parser.error(f"--part {args.part} is of the embedded pair: leave --target out")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: one or more")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is no folder: give another")
    args.out.mkdir(parents=True, exist_ok=True)
    part, name = kinds[args.part](args), f"{args.part}-{args.target}"
    logs = args.out / "logs" / name
    cells = [str(point) for point in part.plan.points]
    if not any(args.only in cell for cell in cells):
        parser.error(f"--only {args.only!r} is in no cell's name: {'; '.join(cells)}")
    lines = args.out / f"{name}.jsonl"
    record = measure(part, lines, logs, args.repeats, args.only)
    if not part.is_steady:
        write_report(part.plan, record, lines, args.out / f"report-{args.part}")
    every = [line for i in range(len(part.plan.points)) for line in verdicts(part, record, i)]
    print("\n".join(["", f"{name}:", *every]))
    failed = sum(line.lstrip().startswith("FAILS") for line in every)
    print(f"{failed} bounds do not hold" if failed else "every bound holds or is open")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

"""4 of 5. Where do the microseconds of a drafting step go? Kernels, launches and idle time by part
of a step, for plain decoding, vLLM's own dflash and this package.

    python tests/gpu/profile_step.py --out gpu-results     # a GPU: 8 minutes
    python tests/gpu/profile_step.py --tiny                # a CPU: a minute or two

Random weights in an 8B target's shapes, 1, 8 and 32 requests, 40 steps each: first timed, then
under torch's profiler (whose own cost shows in its wall time, not in the kernels'). A kernel counts
for the part of the step whose code launched it, its CUDA graph's kernels for the part that launched
the graph: schedule, execute_model (the target), sample_tokens (verification), propose (the draft),
update_from_output. Of each part the kernels that take longest are named. Then single parts of the
draft in CUDA graphs of their own: the context's projection and write, blocks moved to
max_model_len, lm_head and best token. Last, our step with the drafter's metrics and without.

Nothing here has a bound: the figures say what to work on. The traces stay in WORK/traces with
--keep-traces (chrome://tracing or Perfetto opens them). With --tiny the interpreter's steps have no
kernels: the same figures hold zeros for them.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, shapes
from gpu.common import Run
from gpu.kernels import read, summary
from gpu.methods import CONTEXT, TAU, engine, shared, steady
from gpu.starting import Engines, Spec

NAME = "profile_step"
METHODS = ("plain", "native", "dflash")


def specs(run: Run, pair: shapes.Pair) -> list[Spec]:
    """The engines."""
    args = shared(
        run.args.tiny,
        max_model_len=4096,
        max_num_seqs=32,
        cache_bytes=32 * 2048 * shapes.cache_bytes_a_token(run.args.shape),
        made_up=True,
    )
    return [engine(method, pair, args, tau=TAU) for method in METHODS]


def profiled(run: Run, engines: Engines, method: str, requests: int) -> dict[str, Any]:
    """One engine's steps, timed and taken apart."""
    tiny, folder = run.args.tiny, run.work / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{run.path.stem}-{method}-{requests}.json"
    steps = 2 if tiny else 40
    job = {
        "do": "profile",
        "requests": requests,
        "context": 16 if tiny else CONTEXT,
        "warm_steps": 2 if tiny else 20,
        "steps": steps,
        "trace": str(trace),
    }
    timed = engines.do(method, job)
    figure = {"step_ms": timed["step_ms"]} | summary(read(trace), steps)
    if not run.args.keep_traces:
        trace.unlink()
    return figure


def cost_of_metrics(run: Run, engines: Engines, requests: int) -> dict[str, Any]:
    """Our step with the drafter's metrics, two events of the device a step, and without, in
    turns."""
    job = steady(run, requests, 1500)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(1 if run.args.tiny else 3):
        for metrics, steps in found.items():
            steps.append(engines.do("dflash", job | {"metrics": metrics})["step_ms"])
    on, off = median(found[True]), median(found[False])
    return {"with_ms": on, "without_ms": off, "microseconds": 1000 * (on - off)}


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    parser = common.parser(__doc__, NAME, "such as 'dflash, 8 requests' or 'parts'", "qwen3-8b")
    parser.add_argument("--keep-traces", action="store_true", help="some 50 MB each")
    args = parser.parse_args(argv)
    run = common.begin(NAME, args)
    figures: dict[str, tuple[str, Callable[[Engines], dict[str, Any]]]] = {}
    for n in (2,) if args.tiny else (1, 8, 32):
        for method in METHODS:
            figures[f"{method}, {n} requests"] = (
                method,
                lambda engines, method=method, n=n: profiled(run, engines, method, n),
            )
        job = {"do": "pieces", "requests": n, "repeats": 3 if args.tiny else 200}
        figures[f"parts of a draft, {n} requests"] = (
            "dflash",
            lambda engines, job=job: engines.do("dflash", job),
        )
        figures[f"cost of metrics, {n} requests"] = (
            "dflash",
            lambda engines, n=n: cost_of_metrics(run, engines, n),
        )
    wanted = {method for name, (method, _) in figures.items() if run.wants(name)}
    with run.engines([s for s in specs(run, run.large_pair()) if s.name in wanted]) as engines:
        for name, (_, measure) in figures.items():
            run.figure(name, partial(measure, engines))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, here, shapes
from gpu.common import Run
from gpu.kernels import read, summary
from gpu.methods import acceptance_for, engine, shared
from gpu.starting import Engines, Spec

NAME = "profile_step"
KINDS = ("plain", "native", "dflash")
TAU = 4.0
CONTEXT = 256


def specs(run: Run, pair: shapes.Pair, kinds: Sequence[str]) -> list[Spec]:
    """The engines of these kinds."""
    args = shared(
        run.args.tiny,
        max_model_len=4096,
        max_num_seqs=32,
        cache_bytes=32 * 2048 * shapes.cache_bytes_a_token(run.args.shape),
        load_format="dummy",
    )
    rate = acceptance_for(TAU, pair.block_size - 1)
    return [engine(kind, pair, args, acceptance=rate) for kind in kinds]


def profiled(run: Run, engines: Engines, method: str, requests: int) -> dict[str, Any]:
    """One engine's steps, timed and taken apart."""
    tiny = run.args.tiny
    folder = run.work / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{run.path.stem}-{method.replace(' ', '-')}-{requests}.json"
    steps = 2 if tiny else 40
    timed = engines.do(
        method,
        {
            "do": "profile",
            "requests": requests,
            "context": 16 if tiny else CONTEXT,
            "acceptance": None,
            "warm_steps": 2 if tiny else 20,
            "steps": steps,
            "trace": str(trace),
        },
    )
    figure = {"step_ms": timed["step_ms"]} | summary(read(trace), steps)
    if not run.args.keep_traces:
        trace.unlink()
    return figure


def cost_of_metrics(run: Run, engines: Engines, requests: int) -> dict[str, Any]:
    """Our step with the drafter's metrics, two events of the device a step, and without, in
    turns."""
    tiny = run.args.tiny
    job = {
        "do": "steady",
        "requests": requests,
        "context": 16 if tiny else CONTEXT,
        "acceptance": None,
        "cold_steps": 2 if tiny else 40,
        "steps": 3 if tiny else 150,
        "seconds": 60.0 if tiny else 2.0,
        "tokens": 200 if tiny else 1500,
    }
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(1 if tiny else 3):
        for metrics, steps in found.items():
            steps.append(engines.do("dflash", job | {"metrics": metrics})["step_ms"])
    on, off = median(found[True]), median(found[False])
    return {"with_ms": on, "without_ms": off, "microseconds": 1000 * (on - off)}


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    parser = common.parser(__doc__, NAME, "such as 'dflash, 8 requests' or 'parts'")
    large = [name for name in shapes.TARGETS if name.startswith("qwen3")]
    parser.add_argument("--shape", choices=large, default="qwen3-8b", help="the target's shapes")
    parser.add_argument("--keep-traces", action="store_true", help="some 50 MB each")
    args = parser.parse_args(argv)
    args.shape = "tiny" if args.tiny else args.shape
    try:
        run = Run(NAME, args, here.check_here(tiny=args.tiny), shape=args.shape)
    except here.RefusedError as error:
        common.refuse(error)
    pair = shapes.make_pair(args.shape, run.work / "pairs" / args.shape, dtype=run.dtype)
    points = (2,) if args.tiny else (1, 8, 32)
    profiles = {f"{kind}, {n} requests": (kind, n) for n in points for kind in KINDS}
    parts = {f"parts of a draft, {n} requests": n for n in points}
    metrics = {f"cost of metrics, {n} requests": n for n in points}
    of = {name: kind for name, (kind, _) in profiles.items()}
    of |= dict.fromkeys([*parts, *metrics], "dflash")
    kinds = [kind for kind in KINDS if run.wants(*(name for name in of if of[name] == kind))]
    with run.engines(specs(run, pair, kinds)) as engines:
        for name, (kind, n) in profiles.items():
            run.figure(name, lambda kind=kind, n=n: profiled(run, engines, kind, n))
        for name, n in parts.items():
            job = {"do": "pieces", "requests": n, "repeats": 3 if args.tiny else 200}
            run.figure(name, lambda job=job: engines.do("dflash", dict(job)))
        for name, n in metrics.items():
            run.figure(name, lambda n=n: cost_of_metrics(run, engines, n))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

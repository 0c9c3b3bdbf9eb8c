"""3 of 5. What a speculative step costs, in plain steps: this package, vLLM's own dflash and plain
decoding.

    python tests/gpu/step_time.py --out gpu-results        # a GPU: 9 minutes
    python tests/gpu/step_time.py --tiny                   # a CPU: a minute or two

An 8B target's shapes with random weights (vLLM makes them up; nothing is fetched). vLLM accepts
drafts at a given rate (synthetic acceptance), so tau is the same for both drafters and what differs
is time. 1, 32 and 128 requests in flight all the time, contexts of 256 tokens, three repeats in
turns, K a whole block; then K = 7 of the same blocks. Passes where our step takes at most 5 %
longer than vLLM's own with the same K. By the bytes that it has to read, a step with one request
takes 1.19 plain steps at least.

The results are named after vLLM's version: the same command under another vLLM (0.33 beside 0.32)
writes its own file into the same --out. Needs 120 GB of GPU memory; --shape qwen3-4b needs 90.
--tiny says nothing about time; it runs plain, native and ours on a toy pair.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, here, shapes
from gpu.common import Run
from gpu.methods import acceptance_for, engine, names, shared
from gpu.starting import Engines, Spec

NAME = "step_time"
FEWER = 7
CONTEXT = 256
SLOWER_AT_MOST = 1.05
"""Our step over vLLM's own."""


def engines(run: Run, pair: shapes.Pair, k: int) -> list[Spec]:
    """Those of a K: vLLM's own and ours."""
    args = arguments(run)
    rate = acceptance_for(run.args.tau, k)
    return [
        engine(kind, pair, args, name=f"{kind}:{k}", k=k, acceptance=rate)
        for kind in ("native", "dflash")
    ]


def arguments(run: Run) -> dict[str, Any]:
    """Of all engines."""
    # 128 requests of 640 tokens, or 32 of four times as many.
    cache = 128 * 640 * shapes.cache_bytes_a_token(run.args.shape)
    return shared(
        run.args.tiny, max_model_len=4096, max_num_seqs=128, cache_bytes=cache, load_format="dummy"
    )


def figure_name(requests: int, method: str, repeat: int) -> str:
    """Of one measurement."""
    return f"{requests} requests, {method}, repeat {repeat}"


def measure(run: Run, found: Engines, methods: Sequence[str], points: Sequence[int]) -> None:
    """All engines of a wave in turns, point by point."""
    tiny = run.args.tiny
    for requests in points:
        for repeat in range(1, run.args.repeats + 1):
            for method in methods:
                job = {
                    "do": "steady",
                    "requests": requests,
                    "context": 16 if tiny else CONTEXT,
                    "acceptance": None,
                    "cold_steps": 2 if tiny else 40,
                    "steps": 4 if tiny else 150,
                    "seconds": 60.0 if tiny else 2.0,
                    "tokens": 200 if tiny else 300 if requests > 32 else 1500,
                }

                def one(method: str = method, job: dict[str, Any] = job) -> dict[str, Any]:
                    return found.do(method, dict(job))

                run.figure(figure_name(requests, method, repeat), one)


def compare(run: Run, points: Sequence[int], ks: Sequence[int]) -> None:
    """Each K's step at each point, over plain's and over vLLM's own."""

    def steps(requests: int, method: str) -> float:
        found = [
            value["step_ms"]
            for repeat in range(1, run.args.repeats + 1)
            if (value := run.value(figure_name(requests, method, repeat)))
        ]
        if not found:
            raise RuntimeError(f"{method} was not measured with {requests} requests")
        return median(found)

    for requests in points:
        for k in ks:

            def ratio(requests: int = requests, k: int = k) -> dict[str, Any]:
                plain, native, ours = (
                    steps(requests, method) for method in ("plain", f"native:{k}", f"dflash:{k}")
                )
                figure: dict[str, Any] = {
                    "plain_ms": plain,
                    "native_over_plain": native / plain,
                    "dflash_over_plain": ours / plain,
                    "dflash_over_native": ours / native,
                }
                passed = run.args.tiny or ours <= SLOWER_AT_MOST * native
                return figure | {"bound": SLOWER_AT_MOST, "passed": passed}

            name = f"step over plain's, {requests} requests, K = {k}"
            run.figure(name, ratio, made_of_others=True)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    parser = common.parser(__doc__, NAME, "such as '32 requests' or 'native:15'")
    large = [name for name in shapes.TARGETS if name.startswith("qwen3")]
    parser.add_argument("--shape", choices=large, default="qwen3-8b", help="the target's shapes")
    parser.add_argument(
        "--tau", type=float, default=4.0, help="tokens a verified draft (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.repeats = 1 if args.tiny else args.repeats
    args.shape = "tiny" if args.tiny else args.shape
    try:
        device = here.check_here(tiny=args.tiny)
        run = Run(NAME, args, device, shape=args.shape, tau=args.tau, repeats=args.repeats)
    except here.RefusedError as error:
        common.refuse(error)
    pair = shapes.make_pair(args.shape, run.work / "pairs" / args.shape, dtype=run.dtype)
    points = (2,) if args.tiny else (1, 32, 128)
    whole = pair.block_size - 1
    first = [engine("plain", pair, arguments(run)), *engines(run, pair, whole)]
    waves = [first] if args.tiny else [first, engines(run, pair, FEWER)]
    for wave in waves:
        wanted = [
            spec
            for spec in wave
            if run.wants(
                *(
                    figure_name(n, spec.name, repeat)
                    for n in points
                    for repeat in range(1, args.repeats + 1)
                )
            )
        ]
        with run.engines(wanted) as found:
            measure(run, found, names(wave), points)
    compare(run, points, (whole,) if args.tiny else (whole, FEWER))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

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
--tiny says nothing about time; it runs plain, native and ours with K = 15 on a toy pair.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, shapes
from gpu.common import Run
from gpu.methods import TAU, engine, shared, steady
from gpu.starting import Spec

NAME = "step_time"
WHOLE, FEWER = 15, 7
SLOWER_AT_MOST = 1.05
"""Our step over vLLM's own."""


def specs(run: Run, pair: shapes.Pair) -> list[list[Spec]]:
    """The engines, by what runs side by side."""
    # 128 requests of 640 tokens, or 32 of four times as many.
    cache = 128 * 640 * shapes.cache_bytes_a_token(run.args.shape)
    args = shared(
        run.args.tiny, max_model_len=4096, max_num_seqs=128, cache_bytes=cache, made_up=True
    )
    waves = [["plain", f"native:{WHOLE}", f"dflash:{WHOLE}"]]
    waves += [] if run.args.tiny else [[f"native:{FEWER}", f"dflash:{FEWER}"]]
    return [[engine(method, pair, args, tau=run.args.tau) for method in wave] for wave in waves]


def figure_names(run: Run, requests: int, method: str) -> list[str]:
    """Of one engine at one point."""
    repeats = range(1, run.args.repeats + 1)
    return [f"{requests} requests, {method}, repeat {repeat}" for repeat in repeats]


def step_ms(run: Run, requests: int, method: str) -> float:
    """The median of what was measured."""
    values = [run.value(name) for name in figure_names(run, requests, method)]
    found = [value["step_ms"] for value in values if value]
    if not found:
        raise RuntimeError(f"{method} was not measured with {requests} requests")
    return median(found)


def compare(run: Run, points: Sequence[int]) -> None:
    """Each K's step at each point, over plain's and over vLLM's own."""
    for requests in points:
        for k in (WHOLE,) if run.args.tiny else (WHOLE, FEWER):

            def ratio(requests: int = requests, k: int = k) -> dict[str, Any]:
                plain, native, ours = (
                    step_ms(run, requests, method)
                    for method in ("plain", f"native:{k}", f"dflash:{k}")
                )
                return {
                    "plain_ms": plain,
                    "native_over_plain": native / plain,
                    "dflash_over_plain": ours / plain,
                    "dflash_over_native": ours / native,
                    "bound": SLOWER_AT_MOST,
                    "passed": run.args.tiny or ours <= SLOWER_AT_MOST * native,
                }

            name = f"step over plain's, {requests} requests, K = {k}"
            run.figure(name, ratio, made_of_others=True)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    parser = common.parser(__doc__, NAME, "such as '32 requests' or 'native:15'", "qwen3-8b")
    parser.add_argument(
        "--tau", type=float, default=TAU, help="tokens a verified draft (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.repeats = 1 if args.tiny else args.repeats
    run = common.begin(NAME, args, tau=args.tau, repeats=args.repeats)
    points = (2,) if args.tiny else (1, 32, 128)
    for wave in specs(run, run.large_pair()):
        names = {(n, s.name): figure_names(run, n, s.name) for n in points for s in wave}
        wanted = [s for s in wave if run.wants(*(x for n in points for x in names[n, s.name]))]
        with run.engines(wanted) as engines:
            for n in points:
                job = steady(run, n, 300 if n > 32 else 1500)
                for repeat in range(args.repeats):
                    for spec in wave:
                        run.figure(
                            names[n, spec.name][repeat],
                            lambda spec=spec, job=job: engines.do(spec.name, job),
                        )
    compare(run, points)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

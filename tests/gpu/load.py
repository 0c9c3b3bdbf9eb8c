"""5 of 5. Is adaptive drafting ever slower than plain decoding? Our controller against plain, a
fixed K and vLLM's adaptive verification, by load, acceptance and context.

    python tests/gpu/load.py --out gpu-results             # a GPU: 9.5 minutes a call, two calls
    python tests/gpu/load.py --tiny                        # a CPU: a minute or two

A 4B target's shapes with random weights. 1, 32, 128 and 256 requests in flight all the time,
contexts of 1k, 32k and 128k tokens, each draft token accepted with probability 0.05 or 0.6 (vLLM's
synthetic acceptance). Prompts are not computed: vLLM's DecodeBenchConnector fills the KV cache, as
a prompt of 128k tokens would take longer than the measurement. Where a load does not fit in the KV
cache the largest that does takes its place, and the figure is left out with what it would need.

A figure is one method in one cell: tokens a second of the first steps (--cold, what a controller
has not learned shows there) and of the ones after, tau, drafts a request and step, and in which
CUDA graphs target and draft ran. Then each cell's ratios: adaptive passes with at least 0.98 of
plain. Engines run in pairs, plain and adaptive first, so that each has room for its cache; the same
command goes on with the fixed K and vLLM's verification where the time was over.

With --tiny two loads, contexts of 16 tokens and few steps on a toy pair: whether it runs. vLLM's
verification needs CUDA graphs and is left out there.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, shapes
from gpu.common import LeftOutError, Run
from gpu.here import RefusedError
from gpu.methods import TAU, engine, shared, steady
from gpu.starting import Engines

NAME = "load"
WAVES = (("plain", "adaptive"), ("fixed", "verification"))
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "adaptive": ("adaptive", {}),
    "fixed": ("dflash", {}),
    "verification": ("native", {"enable_adaptive_verification": True}),
}
"""Of an engine's name the benchmark's method, and further keys of its speculative config."""
CONTEXTS = (1024, 32768, 131072)
REQUESTS = (1, 32, 128, 256)
ACCEPTANCES = (0.6, 0.05)
NOT_SLOWER = 0.98
"""Of plain decoding's tokens a second."""
ROOM, LEAST_ROOM, SPARE = 1024, 96, 48
"""Tokens that a request may generate in a cell: at most; at least, else the cell does not fit; and
those that are kept free besides, for drafts and for requests that are luckier than others."""
_RESERVE = 9 << 30
"""Bytes of an engine beside weights and KV cache: activations, graphs, CUDA itself."""
FILLED = {
    "kv_connector": "DecodeBenchConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"startup_fill": True, "fill_std": 0.5},
}
Cell = tuple[int, int, float]
"""Requests, context, acceptance."""


def cache_bytes(run: Run) -> int:
    """Of one of two engines that lie side by side."""
    if run.args.tiny:
        return 64 << 20
    share = 0.94 * run.device["total_bytes"] / 2
    found = int(share) - shapes.bytes_of(run.args.shape, True) - _RESERVE
    if found < 2 * ROOM * shapes.cache_bytes_a_token(run.args.shape):
        raise RefusedError(
            f"two engines of {run.args.shape} do not fit into"
            f" {run.device['total_bytes'] / 1e9:.0f} GB: use a larger GPU"
        )
    return found


def room(run: Run, requests: int, context: int, cache: int) -> int:
    """Tokens that each request of a cell may generate before the KV cache is full."""
    each = cache // (requests * shapes.cache_bytes_a_token(run.args.shape))
    return min(ROOM, each - context) - SPARE


def loads(run: Run, context: int, cache: int) -> dict[int, str]:
    """The numbers of requests for a context; with why not, where they do not fit."""
    if run.args.tiny:
        return {1: "", 3: ""}
    each = (context + LEAST_ROOM + SPARE) * shapes.cache_bytes_a_token(run.args.shape)
    fit = cache // each
    found = {
        n: ""
        if n <= fit
        else f"it needs {n * each / 1e9:.0f} GB of KV cache, there are {cache / 1e9:.0f}"
        for n in REQUESTS
    }
    if 1 < fit < max(REQUESTS) and fit not in found:
        found[int(fit)] = ""
    return dict(sorted(found.items()))


def cells(run: Run, cache: int) -> dict[Cell, str]:
    """All cells, the most telling first, each with why not."""
    contexts = (16,) if run.args.tiny else CONTEXTS
    return {
        (n, context, acceptance): why
        for context in contexts
        for acceptance in ACCEPTANCES
        for n, why in loads(run, context, cache).items()
    }


def figure_name(cell: Cell, method: str) -> str:
    """Plain decoding accepts nothing: it is measured once for all acceptances."""
    requests, context, acceptance = cell
    load = f"{requests} requests, context {context}"
    return f"{load}, plain" if method == "plain" else f"{load}, acceptance {acceptance}, {method}"


def measure(
    run: Run, engines: Engines, wave: tuple[str, ...], asked: dict[Cell, str], cache: int
) -> None:
    """The wave's engines in turns, cell by cell."""
    tiny, done = run.args.tiny, set()
    for cell, why in asked.items():
        for method in wave:
            name = figure_name(cell, method)
            if name in done:
                continue
            done.add(name)

            def one(method: str = method, cell: Cell = cell, why: str = why) -> dict[str, Any]:
                if why:
                    raise LeftOutError(why)
                if tiny and method == "verification":
                    raise LeftOutError("vLLM's adaptive verification needs CUDA graphs")
                requests, context, acceptance = cell
                job = steady(
                    run,
                    requests,
                    room(run, requests, context, cache),
                    context=context,
                    acceptance=None if method == "plain" else acceptance,
                    cold_steps=run.args.cold,
                    steps=400,
                    seconds=run.args.seconds,
                )
                return engines.do(method, job)

            run.figure(name, one)


def compare(run: Run, asked: dict[Cell, str]) -> None:
    """Each cell's methods over plain decoding."""
    for cell, why in asked.items():
        requests, context, acceptance = cell

        def ratios(cell: Cell = cell, why: str = why) -> dict[str, Any]:
            if why:
                raise LeftOutError(why)
            plain = run.value(figure_name(cell, "plain"))
            if plain is None:
                raise LeftOutError("plain decoding was not measured")
            found: dict[str, Any] = {}
            for method in (m for wave in WAVES for m in wave if m != "plain"):
                value = run.value(figure_name(cell, method))
                if value is not None:
                    rate, cold = value["tokens_per_second"], value["cold_tokens_per_second"]
                    found[method] = rate / plain["tokens_per_second"]
                    found[f"{method}, first steps"] = cold / plain["cold_tokens_per_second"]
            if "adaptive" not in found:
                raise LeftOutError("adaptive drafting was not measured")
            passed = run.args.tiny or found["adaptive"] >= NOT_SLOWER
            return found | {"bound": NOT_SLOWER, "passed": passed}

        name = f"over plain: {requests} requests, context {context}, acceptance {acceptance}"
        run.figure(name, ratios, made_of_others=True)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    parser = common.parser(__doc__, NAME, "such as 'context 1024' or 'adaptive'", "qwen3-4b")
    parser.add_argument(
        "--cold", type=int, default=100, help="first steps of a cell (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        help="of the first steps, and of the ones after, at most (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    run = common.begin(NAME, args)
    try:
        cache = cache_bytes(run)
    except RefusedError as error:
        common.refuse(error)
    pair, asked = run.large_pair(), cells(run, cache)
    arguments = shared(
        args.tiny,
        max_model_len=max(CONTEXTS) + ROOM,
        max_num_seqs=max(REQUESTS),
        cache_bytes=cache,
        made_up=True,
    ) | {"kv_transfer_config": FILLED}
    for wave in WAVES:
        specs = [
            engine(method, pair, arguments, name=name, tau=TAU, speculative=speculative)
            for name, (method, speculative) in METHODS.items()
            if name in wave
            and not (args.tiny and name == "verification")
            and run.wants(*(figure_name(cell, name) for cell, why in asked.items() if not why))
        ]
        with run.engines(specs) as engines:
            measure(run, engines, wave, asked, cache)
    compare(run, asked)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

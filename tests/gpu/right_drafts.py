"""1 of 5. Does the package draft right on this GPU? Parity with plain PyTorch, CUDA graphs against
eager, and no step that waits for the device.

    python tests/gpu/right_drafts.py --out gpu-results     # a GPU: 8 minutes
    python tests/gpu/right_drafts.py --tiny                # a CPU: a minute or two

Pairs: the embedded one (trained, so its tau says something), as DFlash and as DFlare, and a random
one of an 8B target's widths with 4 layers, whose drafts vLLM's synthetic acceptance accepts in all
lengths. Each with 1, 3, 32 and 40 requests (graphs end at 256 tokens here, so the last ones draft
without), with K below the block, prompts longer than a graph's rows, prompts in chunks, and answers
up to max_model_len. In bfloat16, beside the reference in float32: 99 % of the tokens are to be
equal, or as many as plain PyTorch's own in bfloat16, less one in a hundred.

With --tiny: float32, all tokens equal; no graphs (the interpreter has none), and no check for
waits (vLLM's needs CUDA): those figures are left out.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, here, parity, shapes
from gpu.common import LeftOutError, Run
from gpu.methods import engine, shared
from gpu.parity import GRAPHS, LARGEST_GRAPH, MAX_MODEL_LEN
from gpu.starting import Engines, Spec

NAME = "right_drafts"
REQUESTS = (1, 3, 32, 40)
ACCEPTANCE = 0.6
"""Synthetic, of the random pair's tokens."""


def plan(run: Run) -> dict[str, tuple[Spec, shapes.Pair, int]]:
    """The engines by name, each with its pair and K; a wave is three of them."""
    tiny = run.args.tiny
    dflash, dflare = shapes.embedded(), shapes.embedded("dflare")
    wide = shapes.make_pair(
        "tiny" if tiny else "wide", run.work / "pairs" / "right", dtype=run.dtype, weights=True
    )
    args = shared(
        tiny,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=64,
        cache_bytes=4 << 30,
        **({} if tiny else {"compilation_config": GRAPHS, "max_num_batched_tokens": 2048}),
    )
    eager = args | {"enforce_eager": True}
    eager.pop("compilation_config", None)
    check = {"VLLM_GPU_SYNC_CHECK": "error"}
    found = {
        "dflash graphs": (dflash, args, None, None, {}),
        "dflash eager": (dflash, eager, None, None, {}),
        "dflash sync check": (dflash, args, None, None, check),
        "dflare graphs": (dflare, args, None, None, {}),
        "wide graphs": (wide, args, None, ACCEPTANCE, {}),
        "wide K below the block": (wide, args, 7, ACCEPTANCE, {}),
    }
    return {
        name: (
            engine("dflash", pair, own, name=name, k=k, acceptance=rate, environment=environment),
            pair,
            k or pair.block_size - 1,
        )
        for name, (pair, own, k, rate, environment) in found.items()
        if not (tiny and name in ("dflash eager", "dflash sync check"))
    }


def prompts_for(run: Run, pair: shapes.Pair) -> list[list[int]]:
    """Of a pair: 40, or with --tiny few."""
    length = 256 if run.args.tiny else MAX_MODEL_LEN
    count = 4 if run.args.tiny else 40
    if pair.target.is_relative_to(shapes.EMBEDDED):
        return parity.embedded_prompts(count, length)
    shape = shapes.TARGETS["tiny" if run.args.tiny else "wide"]
    return parity.random_prompts(count, shape["vocab_size"], length)


def figure_names(run: Run, name: str) -> list[str]:
    """Of an engine."""
    if name == "dflash sync check":
        return ["no step waits for the device"]
    return [f"{name}, {n} requests" for n in ((2,) if run.args.tiny else REQUESTS)]


def measure(run: Run, engines: Engines, name: str, pair: shapes.Pair, k: int) -> None:
    """An engine's figures."""
    tiny = run.args.tiny
    prompts = prompts_for(run, pair)
    for figure in figure_names(run, name):
        requests = 32 if name == "dflash sync check" else int(figure.split()[-2])

        def one(requests: int = requests) -> dict[str, Any]:
            # One request at a time takes as many steps as 40 together take: fewer of them.
            chosen = prompts[: max(8, requests)] if requests < 32 else prompts
            made = parity.drafted(engines, name, chosen, requests, 16 if tiny else 64)
            if name == "dflash sync check":
                return {"drafts": len(made["drafts"]), "modes": made["modes"], "passed": True}
            run.keep(f"{name} {requests}", made)
            found = parity.compared(
                engines,
                pair,
                k,
                chosen,
                made,
                max_model_len=256 if tiny else MAX_MODEL_LEN,
                dtype=run.dtype,
                most=60 if tiny else 600,
            )
            if not tiny and "eager" not in name and requests * pair.block_size <= LARGEST_GRAPH:
                # Else nothing is shown of graphs.
                found["passed"] = found["passed"] and made["modes"].get("draft FULL", 0) > 0
            return found

        run.figure(figure, one)


def graphs_against_eager(run: Run) -> dict[str, Any]:
    """The embedded pair's drafts with CUDA graphs and compiled, and without either."""
    if run.args.tiny:
        raise LeftOutError("the interpreter has no CUDA graphs: on a GPU only")
    made = [run.kept(f"dflash {how} 32") for how in ("graphs", "eager")]
    prompts = prompts_for(run, shapes.embedded())
    # Both round, in other places: what both may differ from the reference by.
    return parity.against(*made, prompts, share=0.98, tau=0.02)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    args = common.parser(__doc__, NAME, "such as 'wide' or '40 requests'").parse_args(argv)
    try:
        run = Run(NAME, args, here.check_here(tiny=args.tiny))
    except here.RefusedError as error:
        common.refuse(error)
    planned = plan(run)
    wave = 3
    for first in range(0, len(planned), wave):
        names = [n for n in list(planned)[first : first + wave] if run.wants(*figure_names(run, n))]
        if not names:
            for name in list(planned)[first : first + wave]:
                measure(run, Engines({}, {}), name, *planned[name][1:])
            continue
        with run.engines([*(planned[n][0] for n in names), parity.ORACLE]) as engines:
            for name in names:
                measure(run, engines, name, *planned[name][1:])
    if args.tiny:
        run.figure("no step waits for the device", _needs_cuda)
    run.figure("graphs against eager", lambda: graphs_against_eager(run), made_of_others=True)
    return run.finish()


def _needs_cuda() -> dict[str, Any]:
    raise LeftOutError("vLLM's check for waits needs CUDA: on a GPU only")


if __name__ == "__main__":
    sys.exit(main())

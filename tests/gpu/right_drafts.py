"""1 of 5. Does the package draft right on this GPU? Parity with plain PyTorch, CUDA graphs against
eager, and no step that waits for the device.

    python tests/gpu/right_drafts.py --out gpu-results     # a GPU: 8 minutes
    python tests/gpu/right_drafts.py --tiny                # a CPU: a minute or two

Pairs: the embedded one (trained, so its tau says something), as DFlash and as DFlare, and a random
one of an 8B target's widths with 4 layers, whose drafts vLLM's synthetic acceptance accepts in all
lengths. Each with 1, 3, 32 and 40 requests (graphs end at verifications of 256 tokens here, so the
last ones draft without), with K below the block, prompts longer than a graph's rows, prompts in
chunks, and answers up to max_model_len. In bfloat16, beside the reference in float32: 99 % of the
tokens are to be equal, or as many as plain PyTorch's own in bfloat16, less one in a hundred.

With --tiny: float32, all tokens equal; no graphs (the interpreter has none), and no check for
waits (vLLM's needs CUDA): those figures are left out.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, parity, shapes
from gpu.common import LeftOutError, Run
from gpu.methods import engine
from gpu.starting import Engines, Spec

NAME = "right_drafts"
REQUESTS = (1, 3, 32, 40)
WAVE = 3
"""Engines side by side."""
CHECKED = "dflash sync check"
NO_WAIT = "no step waits for the device"


def plan(run: Run) -> dict[str, tuple[Spec, shapes.Pair, int]]:
    """The engines by name, each with its pair and K."""
    tiny, args = run.args.tiny, parity.arguments(run)
    dflash, dflare = shapes.embedded(), shapes.embedded("dflare")
    wide = shapes.make_pair(
        "tiny" if tiny else "wide", run.work / "pairs" / "right", dtype=run.dtype, weights=True
    )
    eager = {"enforce_eager": True, "compilation_config": {}}
    check = {"VLLM_GPU_SYNC_CHECK": "error"}
    found: dict[str, tuple[shapes.Pair, int, dict[str, Any], dict[str, str]]] = {
        "dflash graphs": (dflash, 7, {}, {}),
        "dflash eager": (dflash, 7, eager, {}),
        CHECKED: (dflash, 7, {}, check),
        "dflare graphs": (dflare, 7, {}, {}),
        "wide graphs": (wide, 15, {}, {}),
        "wide K below the block": (wide, 7, {}, {}),
    }
    return {
        name: (
            engine(
                f"dflash:{k}",
                pair,
                args | own,
                name=name,
                speculative=parity.accepted(k) if pair is wide else None,
                environment=environment,
            ),
            pair,
            k,
        )
        for name, (pair, k, own, environment) in found.items()
        if not (tiny and name in ("dflash eager", CHECKED))
    }


def figure_names(run: Run, name: str) -> list[str]:
    """Of an engine."""
    if name == CHECKED:
        return [NO_WAIT]
    return [f"{name}, {n} requests" for n in ((2,) if run.args.tiny else REQUESTS)]


def measure(run: Run, engines: Engines, name: str, pair: shapes.Pair, k: int) -> None:
    """An engine's figures."""
    prompts = parity.prompts_for(run, pair)
    for figure in figure_names(run, name):
        requests = 32 if name == CHECKED else int(figure.split()[-2])

        def one(requests: int = requests) -> dict[str, Any]:
            # One request at a time takes as many steps as 40 together take: fewer of them.
            chosen = prompts[: max(8, requests)] if requests < 32 else prompts
            made = parity.drafted(run, engines, name, chosen, requests)
            if name == CHECKED:
                checked = run.data["engines"][name]["wait_check"]
                found = {"drafts": len(made["drafts"]), "modes": made["modes"], "check": checked}
                return found | {"passed": checked == "error"}
            run.keep(f"{name} {requests}", made)
            found = parity.compared(run, engines, pair, k, chosen, made)
            if "eager" not in name and not parity.shows_graphs(run, made, requests, k):
                found["passed"] = False
            return found

        run.figure(figure, one)


def graphs_against_eager(run: Run) -> dict[str, Any]:
    """The embedded pair's drafts with CUDA graphs and compiled, and without either."""
    if run.args.tiny:
        raise LeftOutError("the interpreter has no CUDA graphs: on a GPU only")
    made = [run.kept(f"dflash {how} 32") for how in ("graphs", "eager")]
    prompts = parity.prompts_for(run, shapes.embedded())
    # Both round, in other places: what both may differ from the reference by.
    return parity.against(*made, prompts, share=0.98, tau=0.02)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    args = common.parser(__doc__, NAME, "such as 'wide' or '40 requests'").parse_args(argv)
    run = common.begin(NAME, args)
    planned = plan(run)
    for first in range(0, len(planned), WAVE):
        wave = list(planned)[first : first + WAVE]
        wanted = [planned[n][0] for n in wave if run.wants(*figure_names(run, n))]
        with run.engines([*wanted, parity.ORACLE] if wanted else []) as engines:
            for name in wave:
                measure(run, engines, name, *planned[name][1:])
    if args.tiny:
        run.figure(NO_WAIT, _needs_cuda)
    run.figure("graphs against eager", lambda: graphs_against_eager(run), made_of_others=True)
    return run.finish()


def _needs_cuda() -> dict[str, Any]:
    raise LeftOutError("vLLM's check for waits needs CUDA: on a GPU only")


if __name__ == "__main__":
    sys.exit(main())

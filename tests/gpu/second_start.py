"""2 of 5. Does a second start, from the compile cache, draft the same, and what does an FP8 KV
cache cost in tau? Also another attention backend, and a drafter with its own tables under graphs.

    python tests/gpu/second_start.py --out gpu-results     # a GPU: 8 minutes
    python tests/gpu/second_start.py --tiny                # a CPU: a minute or two

The embedded pair starts with every cache empty, ends, and starts again: 99.9 % of the draft tokens
are to be equal, and each start's seconds are noted. Then engines that differ in one setting are
compared with plain PyTorch and with the first one's tau: FP8 keys and values for target and
drafter, for the target alone, Triton's attention, and a random drafter that has an lm_head over
half of the vocabulary and a mask embedding. Within 3 % of the first tau is a pass for FP8, and 1 %
for Triton, whose drafts have to be the reference's besides.

With --tiny: two starts and the tables, in float32; nothing is compiled, and the CPU's attention
takes no FP8 cache and is the only backend: those figures are left out.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, parity, shapes
from gpu.common import LeftOutError, Run
from gpu.methods import engine
from gpu.starting import Engines

NAME = "second_start"
STARTS = ("first start", "second start")
BOTH = "second start against the first"
FP8 = {"kv_cache_dtype": "fp8"}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fp8 cache": (FP8, {}, 0.03),
    "fp8 cache of the target alone": (FP8, {"kv_cache_dtype": "auto"}, 0.03),
    "triton attention": ({"attention_backend": "TRITON_ATTN"}, {}, 0.01),
}
"""Of each engine the arguments, the keys of its speculative config, and how much tau may differ."""
TABLES = "own tables under graphs"


def caches(folder: Path) -> dict[str, str]:
    """All that vLLM, inductor and Triton keep from one start to the next, in one folder."""
    return {
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def drafts(run: Run, engines: Engines, pair: shapes.Pair, name: str) -> dict[str, Any]:
    """The figure of what an engine drafts by CUDA graphs; kept for comparisons."""
    prompts = parity.prompts_for(run, pair)
    requests, k = parity.LARGEST_GRAPH // pair.block_size, pair.block_size - 1
    made = parity.drafted(run, engines, name, prompts, requests)
    run.keep(name, made)
    found = parity.compared(run, engines, pair, k, prompts, made)
    passed = found["passed"] and parity.shows_graphs(run, made, requests, k)
    return found | {"passed": passed}


def starts(run: Run) -> None:
    """The same engine twice, the second from what the first has left."""
    pair, folder = shapes.embedded(), run.work / "caches"
    is_wanted = run.wants(*STARTS)
    if is_wanted:
        shutil.rmtree(folder, ignore_errors=True)
    for name in STARTS:
        spec = engine("dflash", pair, parity.arguments(run), name=name, environment=caches(folder))
        with run.engines([spec, parity.ORACLE] if is_wanted else [], gently=True) as engines:

            def one(name: str = name, engines: Engines = engines) -> dict[str, Any]:
                figure = drafts(run, engines, pair, name)
                ready = run.data["engines"][name]
                return figure | {
                    "start_seconds": ready["seconds"],
                    "compile_seconds": ready["compile_seconds"],
                }

            run.figure(name, one)
    shutil.rmtree(folder, ignore_errors=True)

    def both() -> dict[str, Any]:
        made = [run.kept(name) for name in STARTS]
        return parity.against(*made, parity.prompts_for(run, pair), share=0.999, tau=0.005)

    run.figure(BOTH, both)


def others(run: Run) -> None:
    """Engines that differ from the first in one setting."""
    pair, tiny, args = shapes.embedded(), run.args.tiny, parity.arguments(run)
    tables = shapes.make_pair(
        "tiny" if tiny else "wide",
        run.work / "pairs" / "tables",
        dtype=run.dtype,
        weights=True,
        own_tables=True,
    )
    specs = {
        name: engine("dflash", pair, args | own, name=name, speculative=speculative)
        for name, (own, speculative, _) in OTHERS.items()
        if not tiny
    }
    accepted = parity.accepted(tables.block_size - 1)
    specs[TABLES] = engine("dflash", tables, args, name=TABLES, speculative=accepted)
    wanted = [spec for name, spec in specs.items() if run.wants(name)]
    with run.engines([*wanted, parity.ORACLE] if wanted else []) as engines:
        for name, (own, _, bound) in OTHERS.items():

            def other(
                name: str = name, is_fp8: bool = own is FP8, bound: float = bound
            ) -> dict[str, Any]:
                if tiny:
                    raise LeftOutError("the CPU's attention has no FP8 cache and is the only one")
                figure = drafts(run, engines, pair, name)
                ratio = figure["tau"] / run.kept(STARTS[0])["tau"]
                # FP8 changes the target's own text: its drafts are the reference's no more.
                passed = abs(ratio - 1) <= bound and (is_fp8 or figure["passed"])
                return figure | {"tau_of_first": ratio, "passed": passed}

            run.figure(name, other)
        run.figure(TABLES, lambda: drafts(run, engines, tables, TABLES))


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    args = common.parser(__doc__, NAME, "such as 'start' or 'fp8'").parse_args(argv)
    run = common.begin(NAME, args)
    starts(run)
    others(run)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

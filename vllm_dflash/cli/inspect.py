"""The flags of ``vllm-dflash inspect``."""

from typing import Any

from vllm_dflash.cli.flags import DRAFTER, PAIR, add_command, run_of
from vllm_dflash.flag_types import given


def add(commands: Any) -> None:
    """Adds the command."""
    inspect = add_command(
        commands,
        "inspect",
        "what a checkpoint is, and everything that is wrong with it",
        "Reads a drafter's config.json and every tensor of its weights: its kind, shape and tables,"
        " and whether all is there and finite. Ends with 0 where it is sound and with 1 where not;"
        " each problem is named with its remedy.",
        [
            f"vllm-dflash inspect {PAIR}/dflash",
            "vllm-dflash inspect z-lab/Qwen3-8B-DFlash-b16 --json    # after hf download",
        ],
    )
    inspect.add_argument("path", metavar="PATH", type=given, help=DRAFTER)
    inspect.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    inspect.set_defaults(run=run_of("tools.inspect"))

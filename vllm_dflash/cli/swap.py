"""The flags of ``vllm-dflash swap``."""

import argparse
from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.flag_types import address, given
from vllm_dflash.swap.turns import CONTEXTS, RECOMPUTE


def add(commands: Any) -> None:
    """Adds the command."""
    swap = add_command(
        commands,
        "swap",
        "puts another drafter into a running server, without a restart",
        "Has servers put a drafter with the same config.json in the place of the one that serves,"
        " one server after another, and so the replicas of a deployment of vllm-dflash up; no"
        " request is dropped, and what is generated stays the target's. A drafter that does not fit"
        " is refused, and the old one serves on. Without a drafter it says which one serves. The"
        " server has to have the endpoint, which its administrator turns on (docs/follow.md). After"
        " a restart the server has the drafter of its own command line again. Ends with 0 where all"
        " is done, 1 where a server refused, 2 where one cannot be asked.",
        [
            "vllm-dflash swap --server http://127.0.0.1:8000 refreshed/drafter",
            "vllm-dflash swap --server http://127.0.0.1:8000    # which one serves?",
        ],
    )
    swap.add_argument(
        "drafter",
        metavar="DRAFTER",
        nargs="?",
        type=given,
        help=(
            "its folder on the server's machine, below the one that the server takes drafters from;"
            " relative to that"
        ),
    )
    swap.add_argument(
        "--server",
        metavar="URL",
        type=address,
        action="append",
        required=True,
        help="a server; more than once for more, which take turns",
    )
    swap.add_argument(
        "--context",
        choices=CONTEXTS,
        default=RECOMPUTE,
        help=(
            "what becomes of the context that the old drafter wrote: recompute computes requests in"
            " flight anew and forgets the prefix cache, leave drafts over it (default:"
            f" {RECOMPUTE})"
        ),
    )
    add_key(swap)
    swap.set_defaults(run=run_of("swap.command"))


def add_key(command: argparse.ArgumentParser) -> None:
    """Adds the flag of the server's key."""
    command.add_argument(
        "--api-key",
        metavar="KEY",
        type=given,
        help="the server's API key (default: VLLM_API_KEY, which other users of the machine do"
        " not see)",
    )

"""The flags of ``vllm-dflash top``."""

from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.flag_types import address, seconds


def add(commands: Any) -> None:
    """Adds the command."""
    top = add_command(
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
    top.add_argument(
        "url", metavar="URL", type=address, help="the server, such as http://127.0.0.1:8000"
    )
    top.add_argument(
        "--interval",
        metavar="S",
        type=seconds,
        default="2",
        help="seconds between two looks (default: %(default)s)",
    )
    top.add_argument(
        "--once", action="store_true", help="one look, of the time since the server began"
    )
    top.add_argument(
        "--json", action="store_true", help="one JSON object, for scripts; implies --once"
    )
    top.set_defaults(run=run_of("metrics.top"))

"""The flags of ``vllm-dflash compat``."""

from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.flag_types import path


def add(commands: Any) -> None:
    """Adds the command."""
    compat = add_command(
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
        type=path,
        required=True,
        help="holds vllm/: an unpacked wheel, or a checkout of vLLM",
    )
    compat.add_argument(
        "--against",
        metavar="FOLDER",
        type=path,
        help="holds the vllm/ that it is compared with (default: the installed one)",
    )
    compat.add_argument("--no-diffs", dest="diffs", action="store_false", help="the lists alone")
    compat.set_defaults(run=run_of("tools.compat"))

"""The flags of ``vllm-dflash refresh``."""

from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.cli.swap import add_key
from vllm_dflash.flag_types import DTYPES, MOST_SECONDS, address, count, given, path, real

_LARGEST_SHARE = 64.0


def add(commands: Any) -> None:
    """Adds the command."""
    refresh = add_command(
        commands,
        "refresh",
        "trains the drafter on for what is served now, and keeps it only if it is better",
        "Takes the traffic that a server's recorder kept (or prompts from files), lets the target"
        " answer what has no answer, goes on training from the drafter that serves within a"
        " budget, and measures tau of both on a held-out part of the same traffic. The new one is"
        " kept, and OUT/drafter leads to it, only where it is better by more than its 95 %"
        " interval and vLLM serves it as training said; otherwise nothing changes. Stopped,"
        " however, it goes on with the same command. OUT/journal.txt has every decision. Ends with"
        " 0 where a drafter was kept or nothing was to do, 1 where a stage failed or what was"
        " kept could not be swapped in, 2 on wrong usage, 3 where the new drafter is not better,"
        " 130 where Ctrl-C stopped it.",
        [
            (
                "vllm-dflash refresh --server http://127.0.0.1:8000 --traffic traffic --minutes 15"
                " --out refreshed"
            ),
            (
                "vllm-dflash refresh --server http://127.0.0.1:8000 --traffic traffic --out"
                " refreshed --when-below 0.8 --swap    # for cron"
            ),
            (
                "vllm-dflash refresh --target T --draft D --prompts mine.jsonl --tokens 2000000"
                " --out refreshed"
            ),
        ],
    )
    what = refresh.add_argument_group("what serves")
    what.add_argument("--server", metavar="URL", type=address, help="the server")
    what.add_argument(
        "--target", metavar="T", type=given, help="the target (default: the server's)"
    )
    what.add_argument(
        "--draft",
        metavar="D",
        type=given,
        help="the drafter to begin from (default: the one that the server says, or OUT/drafter)",
    )
    add_key(refresh)
    learned = refresh.add_argument_group("what is learned from")
    learned.add_argument(
        "--traffic",
        metavar="DIR",
        type=given,
        action="append",
        help="the folder of the server's recorder (docs/follow.md)",
    )
    learned.add_argument(
        "--prompts",
        metavar="FILE",
        type=given,
        action="append",
        help="JSON lines, as of vllm-dflash train",
    )
    learned.add_argument(
        "--most-prompts",
        metavar="N",
        type=count,
        default=20000,
        help="the newest so many (default: %(default)s)",
    )
    learned.add_argument(
        "--held-out",
        metavar="N",
        type=count,
        default=64,
        help=(
            "of them, which no training sees: both drafters are measured on them (default:"
            " %(default)s)"
        ),
    )
    _add_budget(refresh)


def _add_budget(refresh: Any) -> None:
    how = refresh.add_argument_group("how")
    how.add_argument(
        "settings",
        nargs="?",
        metavar="SETTINGS.toml",
        help="settings of vllm-dflash train, such as optimizer, lr and batch_size",
    )
    how.add_argument("--out", metavar="DIR", type=path, required=True, help="the refresh's folder")
    budget = how.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes",
        metavar="M",
        type=real(0, MOST_SECONDS / 60, above=True),
        default="15",
        help=(
            "of training, beside answering and proving; at most the settings' epochs (default:"
            " %(default)s)"
        ),
    )
    budget.add_argument(
        "--tokens", metavar="N", type=count, help="drafted tokens that are learned from, instead"
    )
    how.add_argument(
        "--dtype", choices=DTYPES, help="of the target, as served (default: the settings' own)"
    )
    how.add_argument(
        "--when-below",
        metavar="X",
        type=real(0, _LARGEST_SHARE, above=True),
        help=(
            "only where the server's tau since the last look is below X: up to 1 a share of what"
            " the drafter was proved at, above 1 a tau"
        ),
    )
    how.add_argument(
        "--swap",
        action="store_true",
        help="put a drafter that is kept into the server (see vllm-dflash swap)",
    )
    refresh.set_defaults(run=run_of("follow.refresh"), keeps_name=True)

"""The command ``vllm-dflash``: what is installed and replaced in vLLM, and the tools around
checkpoints.

    vllm-dflash --help

One file a command: its flags and their help. What it does is imported when it runs, so that
``--help`` and ``status`` import neither torch nor vLLM.
"""

import argparse
import errno
import os
import signal
import sys

import vllm_dflash
from vllm_dflash import smollm2
from vllm_dflash.cli import (
    bench,
    cluster,
    compat,
    convert,
    doctor,
    inspect,
    refresh,
    status,
    swap,
    top,
    train,
)
from vllm_dflash.supported import INSTALL_VLLM

COMMANDS = (
    *(status, compat, inspect, convert, doctor),
    *(bench, train, refresh, swap, top, cluster),
)
"""Modules, in the order of the help."""
_NOBODY_READS = 128 + signal.SIGPIPE
"""The exit status of a program that the signal ends."""
_COME_WITH_VLLM = ("vllm", "torch", "transformers", "numpy")
"""What commands import when they run, and this package alone does not bring."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(_FULL, "free some space"),
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EACCES: "give this user the right to it and to its folders, or name another",
}
_HELP = """\
Block-diffusion speculative decoding (DFlash, DFlare, and their successors) for stock vLLM.

A new drafter, in this order:
  vllm-dflash status                            is the plug-in on?
  vllm-dflash inspect DRAFTER                   what is it, and is it whole?
  vllm-dflash doctor --target T --draft DRAFTER does the pair fit, and how much is accepted?
  vllm serve T --speculative-config '{"method": "dflash", "model": "DRAFTER"}'
  vllm-dflash bench --target T --draft DRAFTER  how fast is it here, and against what?
  vllm-dflash top URL                           does it pay on a running server?

No drafter yet:
  vllm-dflash train --target T --prompts P --out RUN

The target or its traffic has changed:
  vllm-dflash refresh --server URL --traffic DIR --out DIR
  vllm-dflash swap --server URL DRAFTER

More than one device or machine, on Ray:
  vllm-dflash batch PROMPTS --target T --draft DRAFTER --out DIR
  vllm-dflash up --target T --draft DRAFTER --replicas 1,8
"""


def parser_of_all() -> argparse.ArgumentParser:
    """The parser of the command line, with every command's."""
    parser = argparse.ArgumentParser(
        prog="vllm-dflash", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {vllm_dflash.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser_of_all().parse_args(arguments)
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
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _COME_WITH_VLLM:
            raise
        print(
            f"vllm-dflash: this command needs {package}, which is not installed here; it comes with"
            " vLLM:",
            *INSTALL_VLLM,
            sep="\n  ",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # As with `| head`: nobody reads on. Python flushes once more at its end, into what cannot
        # break.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    except OSError as error:
        # What no command has better words for.
        if error.filename is None and error.errno not in _FULL:
            raise
        print(f"vllm-dflash: {_said(error)}", file=sys.stderr)
        return 2
    return ended


def _said(error: OSError) -> str:
    """Which path the system refused, why, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0, "name another")
    return f"{error.filename or 'a file'} cannot be used ({error.strerror}): {remedy}"

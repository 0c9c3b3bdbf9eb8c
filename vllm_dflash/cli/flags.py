"""What the commands share: a parser with its help, and what runs."""

import argparse
import textwrap
from collections.abc import Callable
from importlib import import_module
from typing import Any

PAIR = "examples/embedded_pair"
"""The pair of a checkout, for examples."""

DRAFTER = "the drafter's folder, or the hub id of one that is already downloaded"
"""The help of a flag that takes a drafter."""


def add_command(
    commands: Any, name: str, help: str, description: str, examples: list[str]
) -> argparse.ArgumentParser:
    """A command's parser: ``help`` is its line among the commands, the rest its own ``--help``."""
    epilog = "\n".join(
        [f"example{'s' if len(examples) > 1 else ''}:", *(f"  {line}" for line in examples)]
    )
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 100, break_on_hyphens=False),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def run_of(module: str) -> Callable[[argparse.Namespace], int]:
    """The ``run`` of a module of this package, imported when it is called: torch takes seconds."""

    def run(args: argparse.Namespace) -> int:
        ended: int = import_module(f"vllm_dflash.{module}").run(args)
        return ended

    return run

"""What the commands' flags share: a command's parser with its help, and types of values."""

import argparse
import textwrap
from collections.abc import Callable
from importlib import import_module
from typing import Any

PAIR = "examples/embedded_pair"
"""The pair of a checkout, for examples."""


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
        description=textwrap.fill(description, 100),
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


def list_of(kind: Callable[[str], Any], *, once: bool = True) -> Callable[[str], list[Any]]:
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


def _at_least_one(text: str) -> int:
    """The type of a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _positive(text: str) -> float:
    """The type of a time in seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time: give seconds above 0")
    return value

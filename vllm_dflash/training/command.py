"""The flags of ``vllm-dflash train``: one for every setting, with its help and default. Tests:
``pytest tests/unit/test_train_settings.py``."""

import argparse
from collections.abc import Callable
from typing import Any

from vllm_dflash.training.settings import STAGES, TABLES, choices_of, every_field

DESCRIPTION = (
    "Makes a drafter for any Hugging Face causal language model that vLLM serves, from prompts"
    " alone or from none, in six stages: with --prompts self:N the target writes prompts itself, as"
    " Magpie does (prompts), it answers them (generate), its hidden states are kept or computed as"
    " needed (features), the drafter learns (train), its tau is measured by the trainer, by plain"
    " PyTorch and by vLLM (prove), and it is written with a model card (export). A run that was"
    " stopped, however, goes on with the same command. Ends with 0 where the drafter serves as"
    " training said, 1 where a stage failed or the three taus disagree, 2 on wrong usage."
)
EXAMPLES = [
    "vllm-dflash train --target Qwen/Qwen3-8B --prompts prompts.jsonl --out runs/qwen3-8b",
    (
        "vllm-dflash train --target Qwen/Qwen3-8B --prompts self:50000 --out runs/qwen3-8b      #"
        " the target writes the prompts"
    ),
    "vllm-dflash train mine.toml --lr 3e-4                  # flags overrule the file",
    "vllm-dflash train mine.toml --dry-run > all.toml       # every setting with its value",
    (
        "vllm-dflash train mine.toml --only generate            # one stage; the next command does"
        " the rest"
    ),
]


def add_flags(command: argparse.ArgumentParser) -> None:
    """Adds the positional TOML file, the stages, and a flag a setting."""
    command.add_argument(
        "settings",
        nargs="?",
        metavar="SETTINGS.toml",
        help="a file with the tables below; flags overrule it",
    )
    command.add_argument(
        "--only",
        metavar="STAGE",
        action="append",
        choices=STAGES,
        help=f"one of {', '.join(STAGES)}; more than once for more",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print every setting and the drafter's shape, and stop",
    )
    groups = {
        name: command.add_argument_group(f"[{name}]", (kind.__doc__ or "").strip())
        for name, kind in TABLES.items()
    }
    for table, item in every_field():
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "dest": item.name,
            "help": _help(item.metadata["help"], item.default),
        }
        if item.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        elif item.name == "prompts":
            options |= {"nargs": "+", "metavar": "FILE|self:N"}
        else:
            options |= {"metavar": _metavar(item)}
        groups[table].add_argument(f"--{item.name.replace('_', '-')}", **options)


def _help(text: str | Callable[[], str], default: Any) -> str:
    text = (text if isinstance(text, str) else text()).replace("%", "%%")
    return (
        text if default in (None, "", ()) or "(default" in text else f"{text} (default: {default})"
    )


def _metavar(item: Any) -> str:
    if choices := choices_of(item):
        return "{" + ",".join(choices) + "}"
    return "X" if "float" in str(item.type) else "N" if "int" in str(item.type) else "VALUE"

"""``vllm-dflash train``, whose flags are the settings of ``training/``."""

from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.training import command as training


def add(commands: Any) -> None:
    """Adds the command."""
    train = add_command(
        commands,
        "train",
        "makes a drafter for a target: prompts, generate, features, train, prove, export",
        training.DESCRIPTION,
        training.EXAMPLES,
    )
    training.add_flags(train)
    # It is in the run's records and in the model card.
    train.set_defaults(keeps_name=True, run=run_of("training.pipeline"))

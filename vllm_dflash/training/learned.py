"""What stage three keeps and leaves: its folder, the note of its end, the trained drafter, and
what the weights depend on. Pure.

pytest tests/unit/test_train_resume.py
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import checksum, claim, read_record
from vllm_dflash.formats import published_format, write
from vllm_dflash.records import AtLeast, Optional
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import inputs as generate_inputs
from vllm_dflash.training.generate import prompts_digest
from vllm_dflash.training.settings import Settings

_NO_PART = frozenset(
    {
        "checkpoint_every",
        "eval_every",
        "eval_prompts",
        "log_every",
        "max_bad_steps",
        "workers",
        "parallel",
        "micro_batch",
        "compile",
        "attention",
    }
)
"""Settings of the table that do not change what is learned, but for rounding."""
_RESULT = {
    "tau": AtLeast(float, 1),
    "tau_everywhere": AtLeast(float, 1),
    "drafts": AtLeast(int, 0),
    "per_position": [AtLeast(int, 0)],
    "prompts": AtLeast(int, 1),
    "steps": AtLeast(int, 1),
    "epochs": AtLeast(float, 0),
    "blocks": AtLeast(int, 0),
    "skipped": AtLeast(int, 0),
    "files": Optional({}),
}
_AGAIN = "remove it, and the stage ends again from its newest checkpoint"


def folder_of(settings: Settings) -> Path:
    """Where the stage keeps checkpoints, log and result."""
    return Path(settings.run.out) / "train"


def final_folder(settings: Settings) -> Path:
    """The trained drafter, in its kind's published format."""
    return folder_of(settings) / "drafter"


def result(settings: Settings) -> Any:
    """What the stage noted at its end; None where it has not got there.

    Raises:
        RunError: the note is damaged.
    """
    return read_record(result_path(settings), _RESULT, _AGAIN)


def result_path(settings: Settings) -> Path:
    """The note of the stage's end."""
    return folder_of(settings) / "result.json"


def trained_folder(settings: Settings) -> Path:
    """``final_folder``, whose files are those that were written.

    Raises:
        TrainingError: one is not.
    """
    folder, found = final_folder(settings), result(settings)
    for name, digest in (found or {}).get("files", {}).items():
        path = folder / name
        if not path.is_file() or checksum(path) != digest:
            raise TrainingError(
                f"{path} is absent or not as it was written: remove {result_path(settings)}, and"
                " the drafter is written again from the newest checkpoint; then look at the disk"
            )
    return folder


def check(settings: Settings, config: DrafterConfig, dtype: str) -> None:
    """Refuses what is trained already where these settings are not what it was trained with.

    Raises:
        RunError: which names what differs.
    """
    claim(folder_of(settings), "train", inputs(settings, config, dtype))


def inputs(settings: Settings, config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """What the weights depend on."""
    table = {name: value for name, value in asdict(settings.train).items() if name not in _NO_PART}
    start = {
        "init": settings.drafter.init,
        "init_from_target": settings.drafter.init_from_target,
        "init_layers": settings.drafter.init_layers,
        "tie_context": settings.drafter.tie_context,
    }
    if settings.drafter.mask_embedding:  # without it as in runs from before there was the setting
        start["mask_embedding"] = True
    return (
        table
        | start
        | {"drafter": write(config, published_format(config)), "prompts": prompts_digest(settings)}
        | generate_inputs(settings, dtype)
    )

"""Training checkpoints: all that a resumed run needs to end as one that was not stopped; the newest two are kept.

Limits: a checkpoint is in memory once more while it is written, so that a full disk is an error of the system's and not of torch's.

    pytest tests/unit/test_train_resume.py
"""

import io
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.training.files import TrainingError, checksum, read_json, whole_file, write_json

_KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the checkpoint of the first ``step`` steps, and removes older ones once it is whole."""
    path = folder / f"step-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
    write_json(path.with_suffix(".json"), {"step": step, "sha256": checksum(path)})
    for old in _finished(folder)[_KEPT:]:
        old.with_suffix(".json").unlink()
        old.unlink()


def load_newest(folder: Path, device: str) -> tuple[int, dict[str, Any]] | None:
    """The newest whole checkpoint's step and state; None where there is none.

    Raises:
        TrainingError: there are checkpoints, but none is as it was written.
    """
    found = _finished(folder)
    for path in found:
        note = read_json(path.with_suffix(".json"))
        if checksum(path) == note["sha256"]:
            return int(note["step"]), torch.load(path, map_location=device, weights_only=True)
        print(f"{path} is not as it was written, and is passed over: look at the disk")
    if found:
        raise TrainingError(f"no checkpoint in {folder} is as it was written: remove the folder to train anew, and look at the disk")
    return None


def _finished(folder: Path) -> list[Path]:
    """Checkpoints with their note, newest first."""
    return sorted((p for p in folder.glob("step-*.pt") if p.with_suffix(".json").is_file()), reverse=True)

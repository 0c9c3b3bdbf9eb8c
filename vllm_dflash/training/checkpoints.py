"""Training checkpoints: all that a resumed run needs to end as one that was not stopped; the newest
two are kept.

Limits: a checkpoint is in memory once more while it is written, so that a full disk is an error of
the system's and not of torch's.

    pytest tests/unit/test_train_resume.py
"""

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.files import checksum, read_record, remove, whole_file, write_record
from vllm_dflash.records import AtLeast
from vllm_dflash.training.errors import TrainingError

_KEPT = 2
_NOTE = {"step": AtLeast(int, 1), "sha256": str}


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the checkpoint of the first ``step`` steps, and removes older ones once it is
    whole."""
    path = _path(folder, step)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
    write_record(path.with_suffix(".json"), {"step": step, "sha256": checksum(path)})
    for old in _finished(folder)[_KEPT:]:
        remove(old.with_suffix(".json"))
        remove(old)


def load_newest(folder: Path, device: str) -> tuple[int, dict[str, Any]] | None:
    """The newest whole checkpoint's step and state; None where there is none. Those that are
    damaged are passed over, with a line.

    Raises:
        TrainingError: there are checkpoints, but none is as it was written.
    """
    found = _finished(folder)
    for path in found:
        try:
            return _load(path, device)
        except (
            TrainingError,
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            LookupError,
            pickle.UnpicklingError,
        ) as error:
            print(
                f"{str(error).splitlines()[0]}\n{path} is not as it was written, and is passed"
                " over: look at the disk"
            )
    if found:
        raise TrainingError(
            f"no checkpoint in {folder} is as it was written ({', '.join(p.name for p in found)}):"
            " remove the folder to train anew, and look at the disk"
        )
    return None


def _load(path: Path, device: str) -> tuple[int, dict[str, Any]]:
    note = read_record(path.with_suffix(".json"), _NOTE, "it belongs to a checkpoint")
    assert note is not None, "it is there, as _finished looks"
    if note["step"] != _step(path) or checksum(path) != note["sha256"]:
        raise TrainingError(f"{path.name} and its .json do not belong together")
    state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise TrainingError(f"{path.name} holds no state of a training")
    return note["step"], state


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _finished(folder: Path) -> list[Path]:
    """Checkpoints with their note, newest first; an OSError where the folder is there and cannot be
    listed, which ``glob`` takes for empty."""
    try:
        found = [Path(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    names = {path.stem for path in found if re.fullmatch(r"step-\d+\.json", path.name)}
    return sorted(
        (folder / f"{name}.pt" for name in names if (folder / f"{name}.pt").exists()),
        key=_step,
        reverse=True,
    )

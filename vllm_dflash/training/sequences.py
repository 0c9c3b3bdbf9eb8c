"""Token sequences on disk: safetensors shards, each with a checksum, read through the system's page
cache.

A shard ``NAME.safetensors`` holds ``tokens`` int32 [sum of lengths], ``starts`` int64 [N + 1] and
``prompt_lengths`` int32 [N]; ``NAME.json`` beside it says that it is whole. Tests: ``pytest
tests/unit/test_files.py``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from vllm_dflash.files import checksum, read_record, refusal, whole_file, write_record
from vllm_dflash.records import AtLeast
from vllm_dflash.training.errors import TrainingError

_NOTE = {"bytes": AtLeast(int, 0), "sha256": str}


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer: token ids int32 [S], of which the first ``prompt_length`` are the
    prompt's."""

    tokens: np.ndarray
    prompt_length: int


def shard_path(folder: Path, index: int) -> Path:
    """Where shard ``index`` of a stage is."""
    return folder / f"shard-{index:05d}.safetensors"


def is_finished(path: Path) -> bool:
    """Whether the shard is there and whole; its note is written last.

    Raises:
        RunError: its note is damaged.
    """
    note = _note(path)
    if note is None:
        return False
    try:
        return path.is_file() and path.stat().st_size == note["bytes"]
    except OSError as error:
        raise refusal(path, error) from None


def _note(path: Path) -> dict[str, Any] | None:
    note = path.with_suffix(".json")
    return read_record(note, _NOTE, f"remove it, and {path.name} is made again by its stage")


def finish(path: Path, **more: object) -> None:
    """Notes that the shard is whole, with its checksum."""
    write_record(
        path.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": checksum(path), **more}
    )


def check(path: Path) -> None:
    """Refuses a shard whose bytes are not those that were written.

    Raises:
        TrainingError: it is absent or spoilt.
    """
    note = _note(path)
    if note is None or not is_finished(path) or checksum(path) != note["sha256"]:
        raise TrainingError(
            f"{path} is absent or not as it was written: remove it and its .json, and run its stage"
            " again; then look at the disk"
        )


def write_sequences(path: Path, sequences: Sequence[tuple[Sequence[int], int]]) -> None:
    """Writes (token ids, prompt length) pairs as a shard."""
    lengths = np.array([len(tokens) for tokens, _ in sequences], np.int64)
    arrays = {
        "tokens": (
            np.concatenate([np.asarray(tokens, np.int32) for tokens, _ in sequences])
            if sequences
            else np.zeros(0, np.int32)
        ),
        "starts": np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        "prompt_lengths": np.array([n for _, n in sequences], np.int32),
    }
    with whole_file(path) as file:
        file.write(save(arrays))
    finish(path, sequences=len(sequences), tokens=int(lengths.sum()))


def header(path: Path) -> tuple[dict[str, dict], int]:
    """Tensor descriptions of a safetensors file, and the offset in bytes that theirs count from."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


class Shard:
    """One shard's sequences; ``tokens`` stays on the disk."""

    def __init__(self, path: Path) -> None:
        check(path)
        self.path = path
        tensors, base = header(path)

        def array(name: str, dtype: type) -> np.ndarray:
            start, end = tensors[name]["data_offsets"]
            count = (end - start) // np.dtype(dtype).itemsize
            return np.memmap(path, dtype, "r", base + start, count) if count else np.zeros(0, dtype)

        self.tokens = array("tokens", np.int32)
        self.starts, self.prompt_lengths = (
            np.array(array("starts", np.int64)),
            np.array(array("prompt_lengths", np.int32)),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(
            np.array(self.tokens[self.starts[index] : self.starts[index + 1]]),
            int(self.prompt_lengths[index]),
        )


class Sequences:
    """The sequences of all shards of a folder, numbered through."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.shards = [Shard(shard_path(folder, i)) for i in range(shards)]
        self.first = np.cumsum([0, *map(len, self.shards)])
        self.lengths = np.concatenate([np.diff(s.starts) for s in self.shards])
        self.prompt_lengths = np.concatenate([s.prompt_lengths for s in self.shards])

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Shard and place in it of sequence ``index``."""
        shard = int(np.searchsorted(self.first, index, "right")) - 1
        return shard, index - int(self.first[shard])

    def __getitem__(self, index: int) -> Sample:
        shard, row = self.place(index)
        return self.shards[shard][row]

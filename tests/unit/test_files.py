"""Files are whole or not there, and shards say when they are spoilt."""

from pathlib import Path

import numpy as np
import pytest

from vllm_dflash.files import RunError, claim, whole_file
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.sequences import Sequences, is_finished, shard_path, write_sequences


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_claim_names_every_difference(tmp_path: Path) -> None:
    claim(tmp_path, "train", {"lr": 1.0, "ids": (1, 2), "new": 0})
    claim(tmp_path, "train", {"lr": 1.0, "ids": (1, 2), "new": 0})
    with pytest.raises(
        RunError,
        match=(
            r"lr 1.0 \(now 2.0\), new 0 \(now None\): set it back, choose another --out, or remove"
        ),
    ):
        claim(tmp_path, "train", {"lr": 2.0, "ids": [1, 2]})


def test_shards(tmp_path: Path) -> None:
    write_sequences(shard_path(tmp_path, 0), [([1, 2, 3], 1), ([4, 5], 1)])
    write_sequences(shard_path(tmp_path, 1), [([6, 7, 8, 9], 2)])
    found = Sequences(tmp_path, 2)
    assert [found[i].tokens.tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert (found.lengths.tolist(), found.prompt_lengths.tolist(), found[2].prompt_length) == (
        [3, 2, 4],
        [1, 1, 2],
        2,
    )
    assert found.place(2) == (1, 0)


def test_spoilt_shards(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    write_sequences(path, [([1, 2, 3], 1)])
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TrainingError, match=r"not as it was written: remove it and its \.json"):
        Sequences(tmp_path, 1)
    path.write_bytes(raw[:-1])
    assert not is_finished(path)
    np.testing.assert_equal(is_finished(shard_path(tmp_path, 7)), False)

"""A target's folder is known by what it holds."""

import os
from pathlib import Path

import numpy as np
import pytest

from vllm_dflash.contents import of_folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with the files of a target: some small, and weights of 8 MiB."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(8 << 20))
    return folder


def test_a_copy_is_the_same_and_what_is_no_part_of_the_model_changes_nothing(
    target: Path, tmp_path: Path
) -> None:
    before = of_folder(str(target))
    target.rename(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("more")
    os.utime(tmp_path / "moved" / "model.safetensors", (0, 0))
    assert before is not None
    assert of_folder(str(tmp_path / "moved")) == before


def test_other_weights_of_the_same_size_are_others(target: Path) -> None:
    before = of_folder(str(target))
    weights = np.fromfile(target / "model.safetensors", "u1")
    (target / "model.safetensors").write_bytes((weights ^ 1).tobytes())
    assert of_folder(str(target)) != before


@pytest.mark.parametrize("at", [0, -1])
def test_the_first_byte_and_the_last_count(target: Path, at: int) -> None:
    before = of_folder(str(target))
    weights = np.fromfile(target / "model.safetensors", "u1")
    weights[at] ^= 1
    (target / "model.safetensors").write_bytes(weights.tobytes())
    assert of_folder(str(target)) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_counts_whole(target: Path, name: str) -> None:
    before = of_folder(str(target))
    (target / name).write_text('{"hidden_size": 9}')
    assert of_folder(str(target)) != before


def test_a_file_more_or_fewer(target: Path) -> None:
    before = of_folder(str(target))
    (target / "chat_template.jinja").write_text("{{ messages }}")
    more = of_folder(str(target))
    (target / "tokenizer.json").unlink()
    assert len({before, more, of_folder(str(target))}) == 3


def test_what_is_no_folder_here_has_none() -> None:
    assert of_folder("org/a-model") is None
    assert of_folder("/nowhere/at/all") is None


def test_what_cannot_be_read_does_not_end_it(target: Path) -> None:
    (target / "gone.json").symlink_to(target / "nothing")
    os.mkfifo(target / "pipe.json")
    assert of_folder(str(target)) is not None

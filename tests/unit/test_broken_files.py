"""Files of a checkpoint that are no files, or endless, or under names that cannot be: refused, and
never waited for.

A pipe as a config.json hung ``inspect`` and vLLM's start; a link to /dev/zero filled the memory.

    pytest tests/unit/test_broken_files.py
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from broken import edit, refused, shard
from pairs import make_random_drafter
from unit.test_checks import configure
from vllm_dflash.tools.describe import as_text
from vllm_dflash.tools.inspect import inspect_checkpoint


def _socket(path: Path) -> None:
    """A socket's address may have a hundred characters only."""
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


_KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be looked at"),
}
_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "mask_embedding.pt",
    "model-00001-of-00002.safetensors",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_no_regular_file(tmp_path: Path, kind: str, name: str) -> None:
    refused(_with(tmp_path / "d", kind, name), name, _KINDS[kind][1])


@pytest.mark.vllm
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kind", _KINDS)
def test_vllm_is_told_the_same(tmp_path: Path, random_target: Path, kind: str, name: str) -> None:
    folder = _with(tmp_path / "d", kind, name)
    message = refused(folder, name)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared)
        configure(random_target, folder)
    assert message in str(error.value)


def _with(folder: Path, kind: str, name: str) -> Path:
    """A drafter one of whose files is no file."""
    make_random_drafter(folder, mask_embedding=True)
    if "of-00002" in name:
        shard(folder)
    (folder / name).unlink(missing_ok=True)
    _KINDS[kind][0](folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300 + ".safetensors", "cannot be looked at (File name too long)"),
        ("a\0b.safetensors", "cannot be looked at"),
        ("../model.safetensors", "not files of this folder: ../model.safetensors"),
        ("/dev/zero", "not files of this folder"),
        ("weights.bin", "not files of this folder"),
        ("", "not files of this folder"),
        ("\x1b[2J.safetensors", "not there: \\x1b[2J"),
    ],
    ids=["long", "null", "above", "absolute", "no safetensors", "empty", "escape"],
)
def test_a_shard_name_that_is_none(tmp_path: Path, name: str, words: str) -> None:
    folder = make_random_drafter(tmp_path / "d")
    index = shard(folder)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"norm.weight": name}}))
    refused(folder, words)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("config.json", 1 << 40),
        ("model.safetensors.index.json", 1 << 40),
        ("mask_embedding.pt", 1 << 40),
    ],
)
def test_a_file_that_is_too_large(tmp_path: Path, name: str, size: int) -> None:
    """A terabyte that takes no room on the disk: it was read whole."""
    folder = make_random_drafter(tmp_path / "d")
    with (folder / name).open("ab") as file:
        file.truncate(size)
    refused(folder, name, "more than the")


def test_escape_codes_are_printed_as_such(tmp_path: Path) -> None:
    folder = make_random_drafter(tmp_path / "d")
    edit(
        folder,
        lambda tensors: tensors.update({"fc\x1b]0;owned\x07.weight": tensors.pop("fc.weight")}),
    )
    message = refused(folder, "unexpected: fc\\x1b]0;owned\\x07.weight")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            raw | {"\x1b[31mkey": 1, "quantization_config": {"quant_method": "fp8", "a": "\x1b[2J"}}
        )
    )
    text = as_text(inspect_checkpoint(folder))
    assert "\x1b" not in text + message
    assert "\\x1b[31mkey" in text

"""A record is taken only in the shape that it was written in; everything else is said by name."""

import os
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash import records
from vllm_dflash.records import AtLeast, Optional, RecordError

SHAPE = {
    "bytes": AtLeast(int, 0),
    "tau": float,
    "name": str,
    "good": bool,
    "rows": [{"by": str}],
    "more": Optional((str, None)),
}
RECORD: dict[str, Any] = {
    "bytes": 3,
    "tau": 2,
    "name": "x",
    "good": True,
    "rows": [{"by": "y"}],
    "other": [],
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert records.read(path, SHAPE) is None
    for more in ({}, {"more": None}, {"more": "z"}):
        path.write_text(records.as_text(RECORD | more))
        assert records.read(path, SHAPE) == RECORD | more


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bytes": True}, "bytes is no whole number"),
        ({"bytes": -1}, "bytes is less than 0"),
        ({"bytes": 1.0}, "bytes is no whole number"),
        ({"bytes": 10**400}, "bytes is no whole number below"),
        ({"tau": float("nan")}, "tau is no number"),
        ({"tau": None}, "tau is no number"),
        ({"good": 1}, "good is no truth value"),
        ({"rows": {}}, "rows is no list"),
        ({"rows": [{}]}, r"rows\[0\].by is not there"),
        ({"more": 1}, "more is no text"),
        ({"format": 2}, "its format is not 1"),
        ({"format": [1]}, "its format is not 1"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(records.as_text(RECORD | changes))
    with pytest.raises(RecordError, match=rf"record.json is not as it was written \({words}"):
        records.read(path, SHAPE)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff{}", b"[" * 100_000, b"1" * 5000, b"{} {}"])
def test_no_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "record.json").write_bytes(raw)
    with pytest.raises(RecordError, match=r"record.json cannot be read \("):
        records.read(tmp_path / "record.json", SHAPE)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe is not waited for, and a device that never ends is not read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("pipe", "no regular file"),
        ("zero", "no regular file"),
        (".", "no regular file"),
        ("loop", "symbolic links"),
    ):
        with pytest.raises(RecordError, match=words):
            records.read(tmp_path / name, SHAPE)


def test_what_a_user_gives_is_an_object() -> None:
    """A list of pairs, or an empty one, was taken for one; text that is too deep ended in a
    traceback."""
    assert records.object_of('{"a": [1]}') == {"a": [1]}
    for text in ("[]", '[["a", 1]]', '"ab"', "null", "{", "[" * 100_000):
        with pytest.raises(ValueError, match=r"it is|Expecting"):
            records.object_of(text)

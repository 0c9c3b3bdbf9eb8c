"""Reads the JSON records that commands keep, each against the shape that it was written in. Pure.

A record is an object. Its shape says what each of its fields is: a type, ``None`` for null, a tuple
of those that may be, ``AtLeast``, ``[shape]`` for a list, ``{name: shape}`` for an object with at
least these fields, ``Optional`` for a field that may be absent. Fields that the shape does not name
may be anything.

    pytest tests/unit/test_records.py
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash.json_text import loads

FORMAT = 1
"""Of all records; another is refused, for its fields may mean something else."""
_FORMAT_FIELD = "format"
_LARGEST = 1 << 26
"""Bytes: a record is small, and what is not one is not read into memory."""
_LARGEST_NUMBER = 1 << 63


class RecordError(RuntimeError):
    """A file is not the record that it should be; the message names it, and the caller adds what to
    do."""


@dataclass(frozen=True)
class AtLeast:
    """A number, ``int`` or ``float``, of at least ``least``."""

    kind: type
    least: float


@dataclass(frozen=True)
class Optional:
    """A field that may be absent."""

    shape: Any


def as_text(record: Mapping[str, Any]) -> str:
    """A record as it is written."""
    return json.dumps({_FORMAT_FIELD: FORMAT, **record}, indent=1) + "\n"


def object_of(text: str) -> dict[str, Any]:
    """The JSON object that a user gave as text.

    Raises:
        ValueError: it is none, or gives a key twice.
    """
    found = loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def read(path: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record at ``path``, without its format; None where there is no file.

    Raises:
        RecordError: it cannot be read, is no JSON object, is of another format, or is not of
            ``shape``.
    """
    try:
        raw = read_regular(path)
        if raw is None:
            return None
        found = loads(raw.decode())
    except (OSError, ValueError) as error:
        said = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).partition("\n")[0][:200]
        )
        raise RecordError(f"{path} cannot be read ({said})") from None
    problem = misfit(found, dict(shape))
    if problem is None and found.pop(_FORMAT_FIELD, FORMAT) != FORMAT:
        problem = f"its format is not {FORMAT}, the one of this version of vllm-dflash"
    if problem is not None:
        raise RecordError(f"{path} is not as it was written ({problem})")
    return dict(found)


def read_regular(path: Path) -> bytes | None:
    """The bytes of a file, or None where there is none.

    Raises:
        OSError: it is a folder, a pipe or a device, which may never end, or cannot be read.
        ValueError: it is too large for a record.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "it is no regular file")
    with os.fdopen(handle, "rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST >> 20} MiB")
    return raw


def misfit(value: Any, shape: Any, where: str = "it") -> str | None:
    """What keeps a value of JSON from having this shape; None where it has."""
    if isinstance(shape, tuple):
        said = [misfit(value, each, where) for each in shape]
        return None if None in said else said[0]
    if isinstance(shape, dict):
        return _misfit_of_fields(value, shape, where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(
            (m for i, each in enumerate(value) if (m := misfit(each, shape[0], f"{where}[{i}]"))),
            None,
        )
    if isinstance(shape, AtLeast):
        problem = misfit(value, shape.kind, where)
        return problem or (
            None if value >= shape.least else f"{where} is less than {shape.least:g}"
        )
    if shape is None:
        return None if value is None else f"{where} is not null"
    if shape is object:
        return None
    good = isinstance(value, int | float if shape is float else shape) and (
        shape is bool or not isinstance(value, bool)
    )
    if good and shape in (int, float):
        good = (
            math.isfinite(value) and abs(value) < _LARGEST_NUMBER
            if isinstance(value, float)
            else abs(value) < _LARGEST_NUMBER
        )
    return None if good else f"{where} is no {_NAMES[shape]}"


_NAMES = {
    int: "whole number below 2**63",
    float: "number below 2**63",
    str: "text",
    bool: "truth value",
}


def _misfit_of_fields(value: Any, shape: Mapping[str, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is no object"
    for name, each in shape.items():
        place = name if where == "it" else f"{where}.{name}"
        optional = isinstance(each, Optional)
        if name not in value:
            if optional:
                continue
            return f"{place} is not there"
        problem = misfit(value[name], each.shape if optional else each, place)
        if problem is not None:
            return problem
    return None

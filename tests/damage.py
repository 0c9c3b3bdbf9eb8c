"""The ways in which a file comes to be damaged, for the tests of everything that a command keeps;
and folders without permission."""

import ctypes
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _json(change: Callable[[Any], Any]) -> Callable[[Path], bool]:
    """Changes a file's JSON; False where it has none."""

    def damage(path: Path) -> bool:
        try:
            found = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError):
            return False
        path.write_text(json.dumps(change(found)))
        return True

    return damage


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], bool]:
    def damage(path: Path) -> bool:
        path.write_bytes(change(path.read_bytes()))
        return True

    return damage


def _numbers(found: Any, value: Any) -> Any:
    if isinstance(found, dict):
        return {name: _numbers(each, value) for name, each in found.items()}
    if isinstance(found, list):
        return [_numbers(each, value) for each in found]
    return value if isinstance(found, int | float) and not isinstance(found, bool) else found


def _without(found: Any) -> Any:
    """Without half of its fields: those of another version, say."""
    return {name: found[name] for name in sorted(found)[::2]} if isinstance(found, dict) else found


def _folder(path: Path) -> bool:
    path.unlink()
    (path / "inside").mkdir(parents=True)
    return True


def _unreadable(path: Path) -> bool:
    path.chmod(0)
    return True


DAMAGES: dict[str, Callable[[Path], bool]] = {
    "empty": _bytes(lambda raw: b""),
    "truncated": _bytes(lambda raw: raw[: len(raw) // 2]),
    "random bytes": _bytes(lambda raw: random.Random(0).randbytes(len(raw))),
    "one byte": _bytes(lambda raw: raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:]),
    "not UTF-8": _bytes(lambda raw: b"\xff\xfe" + raw),
    "a list": _json(lambda found: [found]),
    "null": _json(lambda found: None),
    "nulls": _json(lambda found: dict.fromkeys(found) if isinstance(found, dict) else None),
    "fields missing": _json(_without),
    "another format": _json(
        lambda found: found | {"format": 99} if isinstance(found, dict) else found
    ),
    "huge numbers": _json(lambda found: _numbers(found, 10**400)),
    "negative numbers": _json(lambda found: _numbers(found, -1)),
    "a folder": _folder,
    "no permission": _unreadable,
}
"""Each changes the file at a path; False where it does not apply to such a file. The last one is
felt ``as_a_user``."""
DENIALS = {"nothing": 0o000, "no writing": 0o555, "no listing": 0o333, "no entering": 0o666}
"""Modes of a folder, by what they keep a user from."""
REMEDY = re.compile(r"\b(remove|give|choose|free|set|run|move)\b")
"""What a refusal has beside the name of its file."""
_CAPABILITIES = 0x20080522
"""Version 3 of the kernel's interface to capabilities."""
_PAST_MODES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what has root read and write whatever the modes say."""


@contextmanager
def as_a_user() -> Iterator[None]:
    """Modes of files hold for this thread, also where it is root's, until the end."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(_CAPABILITIES, 0),
        (ctypes.c_uint32 * 6)(),
    )

    def call(name: str) -> None:
        if getattr(libc, name)(header, sets):
            raise OSError(ctypes.get_errno(), name)

    call("capget")
    before = sets[0]
    sets[0] = before & ~_PAST_MODES
    call("capset")
    try:
        yield
    finally:
        sets[0] = before
        call("capset")


def copy_of(folder: Path, to: Path) -> Path:
    """The folder anew, in place of what was there."""
    for inside, _, _ in os.walk(to):
        os.chmod(inside, 0o755)
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))

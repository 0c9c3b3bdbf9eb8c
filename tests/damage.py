"""Ten ways in which a file comes to be damaged, for the tests of everything that a command keeps."""

import json
import random
import shutil
from collections.abc import Callable
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
    "another format": _json(lambda found: found | {"format": 99} if isinstance(found, dict) else found),
    "huge numbers": _json(lambda found: _numbers(found, 10**400)),
    "negative numbers": _json(lambda found: _numbers(found, -1)),
    "a folder": _folder,
}
"""Each changes the file at a path; False where it does not apply to such a file."""


def copy_of(folder: Path, to: Path) -> Path:
    """The folder anew, in place of what was there."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))

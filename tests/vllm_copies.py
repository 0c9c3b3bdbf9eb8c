"""Copies of the installed vLLM with edits, for tests: links take the place of all files but the
edited ones, so that the installed one is never written to."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path


def edited(folder: Path, *edits: tuple[str, str, str]) -> None:
    """A copy below ``folder`` with ``edits``: file, what is replaced once, and by what."""
    copied(folder, {file: partial(_replaced_once, old=old, new=new) for file, old, new in edits})


def renamed(folder: Path, old: str, new: str) -> None:
    """A copy below ``folder`` that calls a name otherwise, wherever it stands."""
    root, word = _installed(), re.compile(rf"\b{old}\b")
    files = [path for path in root.rglob("*.py") if old in path.read_text()]
    assert files
    copied(folder, {str(path.relative_to(root)): partial(word.sub, new) for path in files})


def copied(folder: Path, edits: Mapping[str, Callable[[str], str]]) -> None:
    """A copy below ``folder`` with each of these files edited."""
    installed, copy = _installed(), folder / "vllm"
    _link(installed, copy)
    for file, edit in edits.items():
        source, place = installed, copy
        for part in Path(file).parts[:-1]:
            source, place = source / part, place / part
            if place.is_symlink():  # never write through one
                place.unlink()
                _link(source, place)
        place = copy / file
        assert place.parent.resolve().is_relative_to(folder.resolve())
        text = edit((installed / file).read_text())
        place.unlink()
        place.write_text(text)


def _installed() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _replaced_once(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new, 1)


def _link(source: Path, place: Path) -> None:
    """A folder with links to all that is in another, but for compiled files."""
    place.mkdir()
    for other in source.iterdir():
        if other.name != "__pycache__":
            (place / other.name).symlink_to(other)

"""What a refresh learns from: the newest of the lines that a recorder kept, and of the user's own
files. Pure.

A recorder's file says in its name whose answers it holds; those of another target are left out, and
the target answers these prompts anew. A line of a recorder's that cannot be read, as a kill or a
full disk leaves one, is left out and counted; one of the user's own files is refused. Limits: the
lines that are chosen are in memory once.

    pytest tests/unit/test_follow_traffic.py
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vllm_dflash.errors import printable
from vllm_dflash.fields import json_type
from vllm_dflash.files import RunError
from vllm_dflash.json_text import loads
from vllm_dflash.training.errors import SettingsError

_FILES = "traffic-*.jsonl"
_TARGET = re.compile(r"traffic-\d+-[0-9a-f]{6}-([0-9a-f]{16})\.jsonl")
_ANSWER = ("response", "response_token_ids", "finish_reason")


@dataclass
class Gathered:
    """Lines, the newest first, and where they are from."""

    lines: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    """Of each line its file, and its number there."""
    files: int = 0
    answered: int = 0
    """Lines with an answer of the target."""
    others: int = 0
    """Lines whose answer was another target's, and is left out."""
    broken: int = 0
    """Lines of recorders that cannot be read, and are left out."""

    def __str__(self) -> str:
        said = f"{len(self.lines)} prompts from {self.files} files, {self.answered} with an answer"
        if self.others:
            said += f"; {self.others} answers of another target are asked for again"
        if self.broken:
            said += f"; {self.broken} lines that cannot be read are left out"
        return said


def gather(sources: Sequence[Path], target_files: str | None, most: int) -> Gathered:
    """Up to ``most`` lines.

    Args:
        sources: a recorder's folders, and files of JSON lines.
        target_files: stands for the target (``contents.of_folder``); None: not known.

    Raises:
        SettingsError: a source is not there.
        RunError: there are no lines, or one of the user's own cannot be read.
    """
    found = Gathered()
    for path in _newest_first(sources):
        if len(found.lines) >= most:
            break
        of = _TARGET.fullmatch(path.name)
        foreign = of is not None and target_files is not None and of[1] != target_files
        before = len(found.lines)
        for number, row in _rows(path, most - len(found.lines)):
            if row is None:
                found.broken += 1
                continue
            if foreign and any(name in row for name in _ANSWER):
                row = {name: value for name, value in row.items() if name not in _ANSWER}
                found.others += 1
            found.answered += any(row.get(name) for name in _ANSWER[:2])
            found.lines.append(json.dumps(row, ensure_ascii=False))
            found.origins.append(f"{path}, line {number}")
        found.files += len(found.lines) > before
    if not found.lines:
        raise RunError(
            f"no prompts in {', '.join(map(_described, sources))}: is the recorder on"
            " (docs/follow.md)? Files of your own are given with --prompts"
        )
    return found


def _described(source: Path) -> str:
    """A source, and what of it is not read."""
    if not source.is_dir():
        return str(source)
    others = sorted(p.name for p in source.iterdir() if not fnmatch(p.name, _FILES))[:3]
    besides = f" beside {', '.join(others)}" if others else ""
    return f"{printable(source)} (files {_FILES}{printable(besides)})"


def _newest_first(sources: Sequence[Path]) -> list[Path]:
    """Files by the time of their last line."""
    found: list[tuple[float, Path]] = []
    for source in sources:
        try:
            paths = list(source.glob(_FILES)) if source.is_dir() else [source]
            found += [(path.stat().st_mtime, path) for path in paths]
        except OSError as error:
            raise SettingsError(
                f"{source} cannot be read ({error.strerror or error}): give the recorder's folder,"
                " or a file of JSON lines"
            ) from None
    return [path for _, path in sorted(found, reverse=True)]


def _rows(path: Path, most: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """A file's last lines with their numbers, the newest first; None for one of a recorder's that
    cannot be read. Its last one may be in the middle of being written, and is passed by."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except FileNotFoundError:  # the recorder has removed it meanwhile
        return
    count, is_recorded = 0, fnmatch(path.name, _FILES)
    for number in range(len(lines), 0, -1):
        line = lines[number - 1]
        if not line.strip():
            continue
        try:
            row = loads(line)
        except ValueError as error:
            if is_recorded:
                if number < len(lines):
                    yield number, None
                continue
            raise RunError(
                f"{path}, line {number} is no JSON ({error}): mend or remove the line"
            ) from None
        if not isinstance(row, dict):
            if is_recorded:
                yield number, None
                continue
            raise RunError(
                f"{path}, line {number} is {json_type(row)}, not an object with prompt, messages or"
                " prompt_token_ids: mend or remove the line"
            )
        yield number, row
        count += 1
        if count == most:
            return

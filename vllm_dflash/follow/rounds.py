"""The rounds of a refresh in its folder: what each is about, what it decided, and which drafter is
the one in force. Every note is whole or not there, and every step may be taken twice, so that a
refresh that is killed anywhere goes on with the same command. Pure.

    OUT/drafter             a link to the drafter that was kept last
    OUT/journal.txt         what was decided, in sentences
    OUT/rounds/0001/        round.json, traffic.jsonl, run/ (of training)

A decided round holds no texts of users any more, and of a run that was kept the drafter alone, for
whoever may read what ``vllm-dflash train`` makes; until then its folder is its owner's.

    pytest tests/unit/test_follow_rounds.py
"""

import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_dflash.api_keys import without_secrets
from vllm_dflash.files import point, read_record, remove, whole_file, write_record
from vllm_dflash.records import AtLeast, Optional

KEPT, REFUSED, LEFT = "kept", "refused", "left"
"""Decisions: the new drafter is in force; the old one stays; the round was not for what serves
now."""
_COUNTS = Optional([[AtLeast(int, 0)]])
_NOTES = {
    "target": str,
    "target_files": (str, None),
    "draft": str,
    "draft_id": str,
    "minutes": (AtLeast(float, 0), None),
    "tokens": (AtLeast(int, 1), None),
    "asked": Optional({}),
    "steps": Optional(AtLeast(int, 1)),
    "old": _COUNTS,
    "new": _COUNTS,
    "decision": Optional(str),
    "line": Optional(str),
    "swapped_into": Optional(str),
    "meanwhile": Optional(str),
}
"""``asked``: flags, by the name that a user knows them by. ``old`` and ``new``: of each held-out
prompt the drafts and their accepted tokens. ``meanwhile``: the id of a drafter that somebody has
put into the server while the round ran."""
_JOURNAL_LINES = 2000
_KEPT = 2
"""Drafters that are kept: the one in force, and the one before it to go back to."""
_NAME = re.compile(r"\d{4,9}")


@dataclass(frozen=True)
class Round:
    """One attempt at a better drafter."""

    folder: Path

    @property
    def name(self) -> str:
        return f"round {int(self.folder.name)}"

    @property
    def traffic(self) -> Path:
        """Lines to learn from."""
        return self.folder / "traffic.jsonl"

    @property
    def origins(self) -> Path:
        """Of each of these lines the file and line that it was copied from."""
        return self.folder / "origins.txt"

    @property
    def run(self) -> Path:
        """The training's run folder."""
        return self.folder / "run"

    @property
    def drafter(self) -> Path:
        """What the training exported."""
        return self.run / "drafter"

    def notes(self) -> dict[str, Any]:
        """What it is about, and what is known so far; empty where it was not begun."""
        remedy = "remove the round's folder: the next refresh begins another"
        return read_record(self.folder / "round.json", _NOTES, remedy) or {}

    def note(self, **more: Any) -> dict[str, Any]:
        """Adds to the notes, and returns them. The first ones come once its traffic is there."""
        notes = self.notes() | more
        write_record(self.folder / "round.json", notes)
        return notes


class Rounds:
    """All of a refresh's folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.link, self.watch = out, out / "drafter", out / "watch.json"

    def all(self) -> list[Round]:
        """In their order; those that were begun or not."""
        folder = self.out / "rounds"
        names = os.listdir(folder) if folder.is_dir() else []
        return [Round(folder / name) for name in sorted(filter(_NAME.fullmatch, names), key=int)]

    def new(self) -> Round:
        """A folder for the next one, for its owner's eyes alone."""
        number = 1 + max((int(each.folder.name) for each in self.all()), default=0)
        folder = self.out / "rounds" / f"{number:04d}"
        folder.mkdir(mode=0o700, parents=True)
        return Round(folder)

    def kept(self) -> list[Round]:
        """Those that were kept, the newest last."""
        return [each for each in self.all() if each.notes().get("decision") == KEPT]

    def settle(self) -> Round | None:
        """Ends what a killed refresh has left: the link leads to the newest drafter that was kept,
        and decided rounds hold nothing else.

        Returns:
            The round that was begun and not decided, if there is one.
        """
        kept, open_round = self.kept(), None
        if kept and self.link.resolve() != kept[-1].drafter.resolve():
            point(self.link, kept[-1].drafter)
        for each in reversed(self.all()):
            notes = each.notes()
            if "decision" in notes:
                _clear(each, keep=each in kept[-_KEPT:])
            elif not notes:
                remove(each.folder)  # killed while it took its traffic: nothing is lost
            elif open_round is None:
                open_round = each
            else:  # there is one that was begun after it
                remove(each.folder)
        return open_round

    def say(self, line: str) -> None:
        """Prints a line, and adds it to the journal."""
        line = without_secrets(line)
        print(line, flush=True)
        path = self.out / "journal.txt"
        before = path.read_text().splitlines() if path.is_file() else []
        lines = [*before, f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}"]
        with whole_file(path) as file:
            file.write("".join(f"{each}\n" for each in lines[-_JOURNAL_LINES:]).encode())


def _clear(done: Round, *, keep: bool) -> None:
    """Removes texts of users and what only the training needed; the drafter too, unless it is to
    be kept."""
    remove(done.traffic)
    remove(done.origins)
    if not keep:
        remove(done.run)
        return
    if not done.run.is_dir():
        return
    for path in done.run.iterdir():
        if path != done.drafter:
            remove(path)
    # No texts are left, and a server that runs as another user is to read the drafter.
    done.folder.chmod(stat.S_IMODE(done.run.stat().st_mode))

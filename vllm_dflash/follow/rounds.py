"""The rounds of a refresh in its folder: what each is about, what it decided, and which drafter is
the one in force. Every note is whole or not there, and every step may be taken twice, so that a
refresh that is killed anywhere goes on with the same command. Pure.

    OUT/drafter             a link to the drafter that was kept last
    OUT/journal.txt         what was decided, in sentences
    OUT/rounds/0001/        round.json, traffic.jsonl, run/ (of training), measured.json, plan.json,
                            decision.json

A decided round holds no texts of users any more, and of a run that was kept the drafter alone.

    pytest tests/unit/test_follow_rounds.py
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_dflash.files import point, read_record, remove, whole_file, write_record
from vllm_dflash.records import AtLeast, Optional

KEPT, REFUSED, LEFT = "kept", "refused", "left"
"""Decisions: the new drafter is in force; the old one stays; the round was not for what serves
now."""
_ROUND = {
    "target": str,
    "target_files": (str, None),
    "draft": str,
    "draft_id": str,
    "minutes": (AtLeast(float, 0), None),
    "tokens": (AtLeast(int, 1), None),
}
_DECISION = {"decision": str, "line": str, "tau": Optional((AtLeast(float, 1), None))}
_MEASURED = {"old": Optional([[AtLeast(int, 0)]]), "new": Optional([[AtLeast(int, 0)]])}
_PLAN = {"steps": AtLeast(int, 1), "seconds_a_step": (AtLeast(float, 0), None)}
_REMEDY = "remove the round's folder: the next refresh begins another"
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
    def run(self) -> Path:
        """The training's run folder."""
        return self.folder / "run"

    @property
    def drafter(self) -> Path:
        """What the training exported."""
        return self.run / "drafter"

    def asked(self) -> dict[str, Any] | None:
        """What it is about; None where it was not begun."""
        return read_record(self.folder / "round.json", _ROUND, _REMEDY)

    def begin(self, about: Mapping[str, Any]) -> None:
        """Notes what it is about: once its traffic is there."""
        write_record(self.folder / "round.json", about)

    def measured(self) -> dict[str, Any]:
        """By ``old`` and ``new`` each held-out prompt's drafts and accepted tokens."""
        return read_record(self.folder / "measured.json", _MEASURED, _REMEDY) or {}

    def note_measured(self, counts: Mapping[str, Any]) -> None:
        write_record(self.folder / "measured.json", counts)

    def plan(self) -> dict[str, Any] | None:
        """Steps of the training; None before they are known."""
        return read_record(self.folder / "plan.json", _PLAN, _REMEDY)

    def note_plan(self, steps: int, seconds_a_step: float | None) -> None:
        write_record(self.folder / "plan.json", {"steps": steps, "seconds_a_step": seconds_a_step})

    def decision(self) -> dict[str, Any] | None:
        """What was decided; None where nothing was."""
        return read_record(self.folder / "decision.json", _DECISION, _REMEDY)

    def was_swapped_in(self) -> bool:
        """Whether its drafter was put into a running server."""
        return read_record(self.folder / "swapped.json", {"server": str}, _REMEDY) is not None

    def note_swapped_in(self, server: str) -> None:
        write_record(self.folder / "swapped.json", {"server": server})

    def decide(self, decision: str, line: str, **more: Any) -> None:
        write_record(self.folder / "decision.json", {"decision": decision, "line": line, **more})


class Rounds:
    """All of a refresh's folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    @property
    def link(self) -> Path:
        """Leads to the drafter that was kept last."""
        return self.out / "drafter"

    @property
    def watch(self) -> Path:
        """The record of the last look at the server."""
        return self.out / "watch.json"

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
        decided = [(each, each.decision()) for each in self.all()]
        return [each for each, found in decided if found and found["decision"] == KEPT]

    def settle(self) -> Round | None:
        """Ends what a killed refresh has left: the link leads to the newest drafter that was kept,
        and decided rounds hold nothing else.

        Returns:
            The round that was begun and not decided, if there is one.
        """
        kept, open_round = self.kept(), None
        if kept and self.link.resolve() != kept[-1].drafter.resolve():
            point(self.link, kept[-1].drafter)
        for each in self.all():
            if each.decision() is not None:
                _clear(each, keep=each in kept[-_KEPT:])
            elif each.asked() is None:
                remove(each.folder)  # killed while it took its traffic: nothing is lost
            else:
                open_round = each
        return open_round

    def say(self, line: str, now: datetime | None = None) -> None:
        """Prints a line, and adds it to the journal."""
        print(line, flush=True)
        path = self.out / "journal.txt"
        before = path.read_text().splitlines() if path.is_file() else []
        stamp = (now or datetime.now(UTC)).isoformat(timespec="seconds")
        lines = [*before, f"{stamp} {line}"][-_JOURNAL_LINES:]
        with whole_file(path) as file:
            file.write("".join(f"{each}\n" for each in lines).encode())


def _clear(done: Round, *, keep: bool) -> None:
    """Removes texts of users and what only the training needed; the drafter too, unless it is to
    be kept."""
    remove(done.traffic)
    if not keep:
        remove(done.run)
        return
    for path in done.run.iterdir() if done.run.is_dir() else ():
        if path != done.drafter:
            remove(path)

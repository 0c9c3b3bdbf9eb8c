"""A refresh's rounds on disk: what a killed one leaves, and what the next makes of it."""

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from vllm_dflash.files import RunError, point, write_record
from vllm_dflash.follow.rounds import KEPT, LEFT, REFUSED, Round, Rounds

ABOUT = {
    "target": "t",
    "target_files": None,
    "draft": "d",
    "draft_id": "0" * 12,
    "minutes": 15.0,
    "tokens": None,
}


def made(rounds: Rounds, decision: str | None = None) -> Round:
    """A round with all that a run leaves."""
    each = rounds.new()
    each.traffic.write_text("{}\n")
    each.note(**ABOUT)
    for name in ("generate", "train/checkpoints", "drafter"):
        (each.run / name).mkdir(parents=True)
        (each.run / name / "file").write_text("x")
    if decision is not None:
        each.note(decision=decision, line="line")
    return each


def test_names_and_notes(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    first, second = made(rounds), made(rounds)
    assert [each.folder.name for each in rounds.all()] == ["0001", "0002"]
    assert second.name == "round 2"
    assert first.notes() == ABOUT
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    assert first.note(old=[[3, 4]], steps=12) == {**ABOUT, "old": [[3, 4]], "steps": 12}
    assert first.notes()["steps"] == 12
    assert second.notes() == ABOUT


def test_a_kept_drafter_is_linked_to(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    first = made(rounds, KEPT)
    assert rounds.settle() is None
    assert rounds.link.is_symlink()
    assert rounds.link.resolve() == first.drafter.resolve()
    assert sorted(path.name for path in first.run.iterdir()) == ["drafter"]
    assert not first.traffic.exists(), "texts of users go with the decision"
    second = made(rounds, KEPT)
    rounds.settle()
    assert rounds.link.resolve() == second.drafter.resolve()
    third = made(rounds, KEPT)
    rounds.settle()
    assert rounds.link.resolve() == third.drafter.resolve()
    assert second.drafter.is_dir(), "the one before, to go back to"
    assert not first.drafter.exists()


@pytest.mark.parametrize("decision", [REFUSED, LEFT])
def test_a_refused_round_changes_nothing(tmp_path: Path, decision: str) -> None:
    rounds = Rounds(tmp_path)
    first = made(rounds, KEPT)
    rounds.settle()
    second = made(rounds, decision)
    rounds.settle()
    assert rounds.link.resolve() == first.drafter.resolve()
    assert [path.name for path in second.folder.iterdir()] == ["round.json"]


def test_an_undecided_round_is_gone_on_with(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    made(rounds, REFUSED)
    second = made(rounds)
    assert rounds.settle() == second
    assert second.traffic.exists()


def test_a_round_that_was_not_begun_is_removed(tmp_path: Path) -> None:
    """Killed while it took its traffic: texts that no note speaks of."""
    rounds = Rounds(tmp_path)
    each = rounds.new()
    each.traffic.write_text("{}\n")
    assert rounds.settle() is None
    assert rounds.all() == []


def test_who_may_read_what(tmp_path: Path) -> None:
    """Traffic its owner alone; a drafter that is kept whoever may read one that ``train`` made."""
    rounds = Rounds(tmp_path)
    refused, kept = made(rounds, REFUSED), made(rounds, KEPT)
    rounds.settle()
    assert stat.S_IMODE(refused.folder.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(each.stat().st_mode) for each in (kept.folder, kept.run, kept.drafter)}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


def test_texts_of_rounds_that_were_left(tmp_path: Path) -> None:
    """Two that were not decided: the newer one is gone on with, the older one's texts go."""
    rounds = Rounds(tmp_path)
    first, second = made(rounds), made(rounds)
    assert rounds.settle() == second
    assert not first.folder.exists()


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    each = made(rounds)
    (each.folder / "round.json").write_text("{")
    with pytest.raises(RunError, match=r"round\.json.*remove the round's folder"):
        rounds.settle()
    write_record(each.folder / "round.json", {**ABOUT, "decision": 3})
    with pytest.raises(RunError, match="decision is no text"):
        rounds.settle()


@pytest.mark.parametrize("kills", range(6))
def test_killed_while_it_settles(tmp_path: Path, kills: int) -> None:
    """At any of its moves and removals: the link leads to the old drafter or to the new one, whole,
    and the next settling ends where an undisturbed one does."""
    rounds = Rounds(tmp_path)
    first = made(rounds, KEPT)
    rounds.settle()
    second = made(rounds, KEPT)
    pid = os.fork()
    if pid == 0:
        left = [kills]

        def at(event: str, _: object) -> None:
            if event in ("os.rename", "os.remove", "shutil.rmtree", "os.symlink"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(at)
        rounds.settle()
        os._exit(0)
    os.waitpid(pid, 0)
    assert rounds.link.resolve() in (first.drafter.resolve(), second.drafter.resolve())
    assert (rounds.link / "file").read_text() == "x"
    rounds.settle()
    assert rounds.link.resolve() == second.drafter.resolve()
    assert sorted(path.name for path in second.run.iterdir()) == ["drafter"]
    assert not second.traffic.exists()


def test_a_link_never_takes_a_folders_place(tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    with pytest.raises(RunError, match="no link"):
        point(tmp_path / "drafter", tmp_path)


def test_no_secret_in_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Rounds(tmp_path).say("http://user:pass@host:1: swapped")
    assert "pass" not in (tmp_path / "journal.txt").read_text() + capsys.readouterr().out


def test_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(tmp_path)
    for number in (1, 2):
        rounds.say(f"line {number}")
    assert capsys.readouterr().out == "line 1\nline 2\n"
    lines = (tmp_path / "journal.txt").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["line 1", "line 2"]

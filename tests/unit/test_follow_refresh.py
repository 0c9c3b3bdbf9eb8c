"""``vllm-dflash refresh`` on a tiny pair, with the reference loop in the engine's place: what is
kept, what is refused, and what is said.

pytest tests/unit/test_follow_refresh.py
"""

import json
import os
import re
import shutil
import stat
import time
from pathlib import Path

import pytest

from refreshes import ROUND, Pair, as_toml, command, kill_at
from training_runs import lines_of
from vllm_dflash import contents
from vllm_dflash.cli import main
from vllm_dflash.files import write_record
from vllm_dflash.follow import take
from vllm_dflash.follow.measure import Measure
from vllm_dflash.follow.rounds import KEPT, Rounds
from vllm_dflash.serving_drafter import proof_of
from vllm_dflash.weights.identity import id_of_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("reference_answers")]


def test_a_better_one_is_kept(pair: Pair, undisturbed: Path) -> None:
    target, drafter, _ = pair
    kept = undisturbed / "drafter"
    assert kept.is_symlink()
    note = json.loads((kept / "refresh.json").read_text())
    assert note["tau"] > note["tau_before"] >= 1
    assert note["target_files"] == contents.of_folder(str(target))
    assert note["weights"] == id_of_folder(kept)
    assert proof_of(kept, id_of_folder(kept)).tau == note["tau"]
    assert json.loads((kept / "training.json").read_text())["weights"] == id_of_folder(kept)
    assert id_of_folder(kept) != id_of_folder(drafter)
    journal = (undisturbed / "journal.txt").read_text()
    for said in (
        "round 1: 28 prompts from 1 files, 28 with an answer; begins from drafter",
        "round 1: the old drafter has tau",
        "steps for the budget of 1080 tokens",
        "round 1, kept: tau",
        "on 8 held-out prompts",
    ):
        assert said in journal
    left = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*")}
    assert not any(
        "traffic" in name or "generate" in name or "checkpoints" in name for name in left
    )


def test_no_secret_is_kept(undisturbed: Path) -> None:
    """Neither of the command nor of the settings, in the card or elsewhere."""
    files = [path for path in undisturbed.rglob("*") if path.is_file()]
    assert not [path for path in files if b"sekret" in path.read_bytes()]
    assert "refresh --api-key '***'" in (undisturbed / "drafter" / "README.md").read_text()


def test_what_it_says_how_to_serve(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The link, which leads to the one that is kept later, too; and fewer are held out than were
    asked for."""
    out = tmp_path / "out"
    assert main(command(pair, out, "--held-out", "5000")) in (0, 3)
    said = capsys.readouterr().out
    assert "14 prompts are held out, not 5000: at most half" in said
    assert str(Path("run") / "drafter") not in said.partition("serve it")[2]
    if "round 1, kept" in said:
        assert f'"model": "{out / "drafter"}"' in said


def test_a_drafter_that_came_meanwhile(pair: Pair, undisturbed: Path, tmp_path: Path) -> None:
    """What was begun is kept and said; nothing is swapped over the other."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out, symlinks=True)
    (round_,) = Rounds(out).all()
    notes = {k: v for k, v in round_.notes().items() if k not in ("decision", "line")}
    write_record(round_.folder / "round.json", notes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(take, "_about", lambda options: notes)
        line = "tau 2 -> 3"
        patch.setattr(take, "_take", lambda *_: (KEPT, line))
        options = take.Options(str(pair[0]), str(pair[1]), (), None, None, 1, 4, 10, None)
        assert take.refresh(options, Rounds(out), round_, lambda: "b" * 12)
    assert round_.notes()["meanwhile"] == "b" * 12
    assert f"drafter {'b' * 12} put in meanwhile" in (out / "journal.txt").read_text()


def test_texts_that_are_too_old(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that was stopped, and left for longer than texts are kept, is not gone on with."""
    out = tmp_path / "out"
    kill_at(out / ROUND, command(pair, out), times=2)
    traffic = out / "rounds" / "0001" / "traffic.jsonl"
    assert stat.S_IMODE(traffic.stat().st_mode) == 0o600
    os.utime(traffic, (time.time() - 2 * 86400,) * 2)
    monkeypatch.setenv("VLLM_DFLASH_RECORD_MAX_DAYS", "1")
    assert main(command(pair, out, lr=0.0)) == 3
    assert "round 1, left: its texts are older than 1 days" in (out / "journal.txt").read_text()
    assert not traffic.exists()


def test_a_line_that_cannot_be_learned_from(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is named in the user's file; mended, the same command begins anew."""
    target, drafter, traffic = pair
    mine, out = tmp_path / "mine.jsonl", tmp_path / "out"
    mine.write_text('{"prompt_token_ids": [3, 4, 5]}\n\n{"prompt_token_ids": []}\n')
    asked = command((target, drafter, traffic), out, "--prompts", str(mine))
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert f"{mine}, line 3: prompt_token_ids is no list of ids" in said
    assert "traffic.jsonl" not in said
    assert Rounds(out).all() == []


def test_a_target_that_is_none(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is looked at before a round is begun."""
    _, drafter, traffic = pair
    out = tmp_path / "out"
    assert main(command((tmp_path / "nope", drafter, traffic), out)) == 2
    assert "nope" in capsys.readouterr().err
    assert Rounds(out).all() == []


def test_an_open_round_is_not_for_other_flags(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It once went on with the texts that it had, whatever was asked, and a target that was
    misspelt ended it."""
    _, drafter, traffic = pair
    out, mine = tmp_path / "out", tmp_path / "mine.jsonl"
    mine.write_text('{"prompt_token_ids": [3, 4, 5]}\n')
    kill_at(out / ROUND, command(pair, out), times=2)
    begun = Rounds(out).all()[0].notes()
    for more, changes, said in (
        (["--most-prompts", "1"], {}, "other --most-prompts: give"),
        (["--prompts", str(mine)], {}, "other --traffic and --prompts: give"),
        (["--minutes", "1"], {}, "other --minutes, --tokens: give"),
        ([], {"lr": 0.5}, "other the settings: give"),
    ):
        assert main(command(pair, out, *more, **changes)) == 2
        assert said in capsys.readouterr().err
        assert Rounds(out).all()[0].notes() == begun
    assert main(command((tmp_path / "nope", drafter, traffic), out)) == 2
    assert Rounds(out).all()[0].notes() == begun
    capsys.readouterr()
    assert main(command(pair, out)) in (0, 3)
    assert "round 1 goes on where it was stopped" in capsys.readouterr().out


def test_what_a_refresh_decides_is_no_setting(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(pair, tmp_path / "out")
    toml = Path(asked[1])
    toml.write_text(toml.read_text().replace("[data]", '[data]\nprompts = ["elsewhere"]'))
    assert main(asked) == 2
    assert "[data] has prompts, which this command decides" in capsys.readouterr().err


def test_the_minutes_hold(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the estimate was wrong, training ends with what was learned, and is judged."""
    monkeypatch.setattr(Measure, "steps_in", lambda measure, minutes: (1_000_000,) * 2)
    out = tmp_path / "out"
    began = time.monotonic()
    assert main(command(pair, out, "--minutes", "0.05")) in (0, 3)
    assert time.monotonic() - began < 120
    journal = (out / "journal.txt").read_text()
    assert re.search(r"round 1: \d+ of 1000000 steps, then the 0.05 minutes were over", journal)
    assert "on 8 held-out prompts" in journal


def test_the_budget_in_tokens(undisturbed: Path) -> None:
    """Blocks of 4 draft 3 tokens: 4 sequences x 6 anchors x 3 are 72 a step."""
    (only,) = Rounds(undisturbed).all()
    assert only.notes()["steps"] == 1080 // 72


def test_one_that_is_not_better_changes_nothing(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns nothing, so it is the old one: a gain of 0 is not better."""
    out = tmp_path / "out"
    assert main(command(pair, out, lr=0.0)) == 3
    assert "not better by more than its interval" in capsys.readouterr().out
    assert not (out / "drafter").exists()
    (only,) = Rounds(out).all()
    assert not only.run.exists()
    assert not only.traffic.exists()


def test_the_next_one_begins_from_the_one_that_was_kept(
    pair: Pair, undisturbed: Path, tmp_path: Path
) -> None:
    """Without --draft; and a refused round leaves the link where it is."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out, symlinks=True)
    before = (out / "drafter").resolve()
    target, _, traffic = pair
    toml = as_toml(tmp_path / "small.toml", lr=0.0)
    asked = ["--target", target, "--traffic", traffic, "--out", out, "--tokens", "500"]
    assert main(["refresh", str(toml), *map(str, asked), "--held-out", "8"]) == 3
    assert (out / "drafter").resolve() == before
    assert f"begins from drafter {id_of_folder(before)}" in (out / "journal.txt").read_text()


def test_minutes_are_turned_into_steps(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the trainer's own steps, before any of them counts."""
    measured, steps_in = [], Measure.steps_in

    def both(self: Measure, minutes: float) -> tuple[int, int]:
        measured.extend([steps_in(self, minutes), steps_in(self, 0.0)])
        return measured[0]

    monkeypatch.setattr(Measure, "steps_in", both)
    out = tmp_path / "out"
    assert main(command(pair, out, "--minutes", "0.02", epochs=1000.0)) in (0, 3)
    assert 1 < measured[0][0] < 1000
    assert measured[1][0] == 1, "at least one"
    said = f"{measured[0][0]} steps for the budget of 0.02 minutes\n"
    assert said in (out / "journal.txt").read_text()


def test_few_answers_end_a_budget_in_minutes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two passes over 20 answers, by 4 a step."""
    out = tmp_path / "out"
    assert main(command(pair, out, "--minutes", "5", epochs=2.0)) in (0, 3)
    (only,) = Rounds(out).all()
    assert only.notes()["steps"] == 10
    said = (
        r"round 1: 10 steps for the budget of 5 minutes, which has time for \d+: more than 2 pass"
    )
    assert re.search(said, (out / "journal.txt").read_text())


def test_a_round_for_another_drafter_is_left(pair: Pair, undisturbed: Path, tmp_path: Path) -> None:
    """It was stopped, and another drafter serves meanwhile: what it measured is of the old one."""
    out = tmp_path / "out"
    kill_at(out / ROUND, command(pair, out), times=2)
    target, _, traffic = pair
    toml = as_toml(tmp_path / "again.toml", lr=0.0)
    flags = ["--target", target, "--draft", undisturbed / "drafter", "--traffic", traffic]
    asked = ["refresh", str(toml), *map(str, flags), "--out", str(out), "--tokens", "500"]
    assert main([*asked, "--held-out", "8"]) == 3
    journal = (out / "journal.txt").read_text()
    assert "round 1, left: it was for another target or drafter" in journal
    assert "round 2, refused" in journal


def test_answers_of_the_old_target_are_asked_for_again(pair: Pair, tmp_path: Path) -> None:
    target, drafter, traffic = pair
    (recorded,) = traffic.iterdir()
    folder = tmp_path / "traffic"
    folder.mkdir()
    (folder / f"traffic-1-aaaaaa-{'0' * 16}.jsonl").write_text(recorded.read_text())
    out = tmp_path / "out"
    assert main(command((target, drafter, folder), out)) in (0, 3)
    journal = (out / "journal.txt").read_text()
    assert "0 with an answer; 28 answers of another target are asked for again" in journal
    assert len(lines_of(recorded)) == 28


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--swap"], "--swap asks a server"),
        (["--when-below", "0.8"], "--when-below asks a server"),
        (["--server", "127.0.0.1:9"], "does not answer"),
    ],
)
def test_wrong_usage(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(command(pair, tmp_path / "out", *flags)) == 2
    assert said in capsys.readouterr().err

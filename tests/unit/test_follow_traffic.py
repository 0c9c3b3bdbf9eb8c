"""What a refresh takes of recorded traffic."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.files import RunError
from vllm_dflash.follow.traffic import gather

OURS, THEIRS = "0123456789abcdef", "fedcba9876543210"


def write(path: Path, rows: list[Any], age: float = 0.0, tail: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"prompt": name, "response": f"to {name}", "finish_reason": "stop"} | more


def test_the_newest_lines_of_the_newest_files(tmp_path: Path) -> None:
    folder = tmp_path / "traffic"
    write(folder / f"traffic-1-aaaaaa-{OURS}.jsonl", [row("a"), row("b")], age=100)
    write(folder / f"traffic-2-bbbbbb-{OURS}.jsonl", [row("c"), row("d"), row("e")])
    write(folder / "other.jsonl", [row("not the recorder's")])
    found = gather([folder], OURS, 4)
    assert [json.loads(line)["prompt"] for line in found.lines] == ["e", "d", "c", "b"]
    assert (found.files, found.answered, found.others) == (2, 4, 0)
    assert str(found) == "4 prompts from 2 files, 4 with an answer"


def test_answers_of_another_target_are_asked_for_again(tmp_path: Path) -> None:
    """After a fine-tune the old target's answers would teach the old target."""
    folder = tmp_path / "traffic"
    write(folder / f"traffic-1-aaaaaa-{THEIRS}.jsonl", [row("a"), {"prompt": "b"}])
    write(folder / f"traffic-2-bbbbbb-{OURS}.jsonl", [row("c")])
    write(folder / "traffic-3-cccccc.jsonl", [row("d")])  # of a hub id: its revisions do not change
    found = gather([folder], OURS, 10)
    by_prompt = {json.loads(line)["prompt"]: json.loads(line) for line in found.lines}
    assert by_prompt == {"a": {"prompt": "a"}, "b": {"prompt": "b"}, "c": row("c"), "d": row("d")}
    assert (found.answered, found.others) == (2, 1)
    assert "1 answers of another target are asked for again" in str(found)
    assert gather([folder], None, 10).others == 0, "which target it is is not known"


def test_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = write(tmp_path / "traffic" / "traffic-1-aaaaaa.jsonl", [row("a")], tail='{"prompt": "b')
    assert len(gather([path.parent], None, 10).lines) == 1


def test_a_broken_line_of_a_recorders_is_left_out_and_counted(tmp_path: Path) -> None:
    """As a kill or a full disk leaves one; once it stopped every refresh."""
    tail = "no json\n[1]\n" + json.dumps(row("b"))
    path = write(tmp_path / "traffic" / "traffic-1-aaaaaa.jsonl", [row("a")], tail=tail)
    found = gather([path.parent], None, 2)
    assert [json.loads(line) for line in found.lines] == [row("b"), row("a")]
    assert "; 2 lines that cannot be read are left out" in str(found)


def test_files_of_the_users(tmp_path: Path) -> None:
    mine = write(tmp_path / "x" / "mine.jsonl", [row("a"), {"prompt_token_ids": [1, 2]}])
    assert len(gather([mine], OURS, 10).lines) == 2
    with pytest.raises(RunError, match="cannot be read"):
        gather([tmp_path / "absent.jsonl"], OURS, 10)
    with pytest.raises(
        RunError, match=r"x \(files traffic-\*\.jsonl beside mine\.jsonl\): is the recorder on"
    ):
        gather([tmp_path / "x"], OURS, 10)


def test_a_line_of_the_users_is_named(tmp_path: Path) -> None:
    """By its file and number, and a byte order mark is none of the first."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\ufeff" + json.dumps(row("a")) + "\n\n" + json.dumps(row("b")))
    found = gather([mine], OURS, 10)
    assert found.origins == [f"{mine}, line 3", f"{mine}, line 1"]
    for bad in ("{", "[1]", '"text"', "null"):
        mine.write_text(json.dumps(row("a")) + "\n" + bad)
        with pytest.raises(RunError, match=r"mine\.jsonl, line 2 is"):
            gather([mine], OURS, 10)

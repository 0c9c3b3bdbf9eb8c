"""The recorder's bounds in age, the user's redaction, and whose answers a file holds."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash import contents
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.line_writer import LineWriter, age_of
from vllm_dflash.training.redaction import load


def line(name: str, size: int = 0) -> str:
    return json.dumps({"prompt": name, "response": "x" * size, "finish_reason": "stop"})


def prompts(folder: Path) -> list[str]:
    """Of all files, whose order is by chance where they were written in one tick of the clock."""
    files = folder.glob("traffic-*.jsonl")
    found = [json.loads(row)["prompt"] for path in files for row in path.read_text().splitlines()]
    return sorted(found, key=lambda name: (len(name), name))


def write(writer: LineWriter, *lines: str, target: str | None = None) -> None:
    for each in lines:
        writer.put(each, target)
        writer.drain()


def test_without_an_age_a_full_folder_ends_the_recording(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path, 20_000)
    write(writer, *(line(str(i), 1000) for i in range(40)))
    assert writer.stopped
    assert prompts(tmp_path)[0] == "0"


def test_with_an_age_the_oldest_file_makes_room(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path, 20_000, days=1.0)
    write(writer, *(line(str(i), 1000) for i in range(60)))
    assert not writer.stopped
    kept = prompts(tmp_path)
    assert kept[-1] == "59"
    assert "0" not in kept
    assert len(kept) > 12, "most of what fits is kept"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_a_line_larger_than_all_ends_the_recording(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path, 20_000, days=1.0)
    write(writer, line("a"), line("b", 30_000))
    assert writer.stopped


def test_too_old(tmp_path: Path) -> None:
    """Another process's file too, of a server that has ended."""
    writer = LineWriter(tmp_path, 1 << 20, days=2.0)
    write(writer, line("old"))
    left = tmp_path / "traffic-1-aaaaaa.jsonl"
    left.write_text(line("left behind") + "\n")
    days = 86400
    for path in (writer.path, left):
        os.utime(path, (time.time() - 1.95 * days,) * 2)
    # The file's own first line is as old as its name, which is kept in memory.
    writer._began -= 1.95 * days
    write(writer, line("new"))
    assert prompts(tmp_path) == ["new"]


def test_a_young_file_stays(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path, 1 << 20, days=2.0)
    write(writer, line("a"))
    writer._began -= 0.5 * 86400
    write(writer, line("b"))
    assert prompts(tmp_path) == ["a", "b"]
    assert len(list(tmp_path.iterdir())) == 2, "files take turns"


@pytest.mark.parametrize("text", ["0", "-1", "week", "nan", "inf", "1e9"])
def test_no_age(text: str) -> None:
    with pytest.raises(TrainingError, match="VLLM_DFLASH_RECORD_MAX_DAYS is"):
        age_of(text)


def test_an_age() -> None:
    assert (age_of(None), age_of(""), age_of("0.5")) == (None, None, 0.5)


def test_whose_answers_they_are(tmp_path: Path) -> None:
    """The name ends in the target's digest; of a hub id, whose revisions do not change, in none."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    folder = tmp_path / "traffic"
    writer = LineWriter(folder, 1 << 20)
    write(writer, line("a"), target=str(target))
    assert writer.path.name.endswith(f"-{contents.of_folder(str(target))}.jsonl")
    assert [path.name for path in folder.iterdir()] == [writer.path.name], "no empty file is left"
    write(writer, line("b"), target=str(target))
    assert prompts(folder) == ["a", "b"]
    write(writer, line("c"), target="org/model")
    assert len(list(folder.iterdir())) == 2
    assert writer.path.name.count("-") == 2


def test_redaction(tmp_path: Path) -> None:
    def hide(found: dict[str, Any]) -> dict[str, Any] | None:
        if "secret" in found["prompt"]:
            return None
        return found | {"response": "..."}

    writer = LineWriter(tmp_path, 1 << 20, redact=hide)
    write(writer, line("a", 3), line("a secret"), line("b"))
    rows = [json.loads(row) for row in writer.path.read_text().splitlines()]
    assert [(row["prompt"], row["response"]) for row in rows] == [("a", "..."), ("b", "...")]


@pytest.mark.parametrize("answer", ["text", 3, [1]])
def test_a_redaction_that_fails_leaves_the_line_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    """And recording goes on; a raw line is never written in its place."""

    def broken(found: dict[str, Any]) -> Any:
        if found["prompt"] == "raise":
            raise ValueError(f"text of a user: {found}")
        return answer if found["prompt"] == "wrong" else found

    writer = LineWriter(tmp_path, 1 << 20, redact=broken)
    write(writer, line("raise"), line("wrong"), line("a"))
    assert prompts(tmp_path) == ["a"]
    assert (
        caplog.text.count("lines are left out, as VLLM_DFLASH_RECORD_REDACT fails: ValueError") == 1
    )
    assert "text of a user" not in caplog.text
    assert caplog.text.count(f"it returned a {type(answer).__name__}, not a dict or None") == 1


def test_a_redaction_with_values_that_are_no_jsons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LineWriter(tmp_path, 1 << 20, redact=lambda found: found | {"x": {"a user's text"}})
    write(writer, line("a"), line("b"))
    assert prompts(tmp_path) == []
    assert caplog.text.count("values that are none of JSON's") == 1
    assert "a user's text" not in caplog.text


def test_the_functions_name() -> None:
    assert load(None) is None
    assert load("json:dumps") is json.dumps
    for name in ("json", "json:", "json:absent", "no_such_module:f", ":f"):
        with pytest.raises(TrainingError, match="give MODULE:FUNCTION"):
            load(name)
    with pytest.raises(TrainingError, match="no function"):
        load("json:__name__")

"""The stage that has the target write its prompts: resumed with the same ones, refused where that
leads nowhere; no engine is run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from damage import DAMAGES, copy_of
from training_runs import SMALL, lines_of
from vllm_dflash.files import RunError
from vllm_dflash.training import self_prompts, target
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.errors import SettingsError, TrainingError
from vllm_dflash.training.prompts import Reader, split
from vllm_dflash.training.sequences import write_sequences
from vllm_dflash.training.settings import Settings

TARGET = Path(__file__).parents[2] / "examples" / "embedded_pair" / "target"
WORDS = [
    "def",
    "class",
    "return",
    "import",
    "self",
    "list",
    "string",
    "number",
    "value",
    "index",
    "path",
    "open",
    "read",
    "write",
]


def chosen(out: Path, **changes: Any) -> Settings:
    flags = (
        SMALL
        | {
            "target": str(TARGET),
            "out": str(out),
            "prompts": ("self:20",),
            "mask_token_id": 1,
            "shard_size": 8,
        }
        | changes
    )
    return training_settings.load(None, flags)


class Answers:
    """Stands for the engines: a part's turns follow from its seed; stops, if asked, after some
    parts."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, words: list[str] = WORDS
    ) -> None:
        self.tokenizer, self.words, self.written, self.most = tokenizer, words, 0, 10**6
        monkeypatch.setattr(self_prompts, "answer", self)

    def __call__(
        self,
        settings: Settings,
        dtype: str,
        room: int,
        jobs: list[dict[str, Any]],
        shown: tuple[str, str],
    ) -> None:
        assert shown == ("prompts", " turns")
        for job in jobs:
            if self.written == self.most:
                raise KeyboardInterrupt
            turns = []
            for i, header in enumerate(job["prompts"]):
                drawn = random.Random(job["seed"] + i)
                text = " ".join(drawn.choice(self.words) for _ in range(drawn.randint(2, 9)))
                turns.append(([*header, *self.tokenizer(text)["input_ids"], 0], len(header)))
            write_sequences(Path(job["path"]), turns)
            self.written += 1


@pytest.fixture(scope="module")
def found() -> Any:
    return target.find_target(chosen(Path("unused")))


def test_stopped_it_ends_with_the_same_prompts(
    tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answers = Answers(monkeypatch, found.tokenizer)
    whole, stopped = chosen(tmp_path / "whole"), chosen(tmp_path / "stopped")
    self_prompts.write_prompts(whole, found, 1024)
    said = capsys.readouterr().out
    assert "20 prompts of" in said
    assert "left out: " in said
    expected = self_prompts.path_of(whole).read_bytes()
    rows = lines_of(self_prompts.path_of(whole))
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == 20
    answers.written, answers.most = 0, 1
    with pytest.raises(KeyboardInterrupt):
        self_prompts.write_prompts(stopped, found, 1024)
    with pytest.raises(TrainingError, match="is not finished: run the stage prompts first"):
        self_prompts.as_files(stopped)
    answers.most = 10**6
    self_prompts.write_prompts(stopped, found, 1024)
    assert self_prompts.path_of(stopped).read_bytes() == expected
    answers.most = answers.written
    self_prompts.write_prompts(stopped, found, 1024)
    assert "20 prompts of" in capsys.readouterr().out
    self_prompts.path_of(stopped).with_suffix(".json").unlink()
    self_prompts.write_prompts(stopped, found, 1024)
    assert self_prompts.path_of(stopped).read_bytes() == expected, (
        "from its parts, without an engine"
    )
    other = chosen(tmp_path / "other", seed=1)
    answers.most = 10**6
    self_prompts.write_prompts(other, found, 1024)
    assert self_prompts.path_of(other).read_bytes() != expected


def test_mixed_with_files(tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, found.tokenizer)
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": "a prompt of my own"}) + "\n")
    settings = chosen(tmp_path / "run", prompts=(str(mine), "self:20"))
    self_prompts.write_prompts(settings, found, 1024)
    data = self_prompts.as_files(settings)
    assert data.prompts == (str(mine), str(self_prompts.path_of(settings)))
    parts = split(Reader(found.tokenizer, 4096, "{}"), data, 0)
    assert len(parts.train) + len(parts.held_out) == 21
    self_prompts.path_of(settings).write_text("{}\n")
    with pytest.raises(
        TrainingError, match=r"prompts.jsonl is not as it was written: remove .*prompts.json"
    ):
        self_prompts.as_files(settings)


def test_openings(tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns begin with them in rotation, and a text is whole; other openings are another run; what
    is no list of texts is refused."""
    Answers(monkeypatch, found.tokenizer)
    path = tmp_path / "openings.json"
    path.write_text(json.dumps(["", "import the ", "class\n"]))
    settings = chosen(tmp_path / "run", self_openings=str(path), self_repetition=1.0)
    self_prompts.write_prompts(settings, found, 1024)
    texts = [row["messages"][0]["content"] for row in lines_of(self_prompts.path_of(settings))]
    begun = [[text.startswith(opening) for text in texts] for opening in ("import the", "class\n")]
    assert all(5 <= sum(each) <= 8 for each in begun), texts
    assert not any(text.startswith("import the ") and " " not in text[11:] for text in texts[:3])
    path.write_text(json.dumps(["Explain"]))
    with pytest.raises(RunError, match="begun by the stage prompts with self_openings"):
        self_prompts.write_prompts(settings, found, 1024)
    for wrong, words in (
        ("{}", "is no list of texts"),
        ("[]", "is no list of texts"),
        ("[1]", "is no list of texts"),
        ("[", "cannot be read as JSON"),
        ('["<|mask|>"]', "holds a special token"),
    ):
        path.write_text(wrong)
        with pytest.raises(TrainingError, match=words):
            self_prompts.write_prompts(
                chosen(tmp_path / wrong[:2], self_openings=str(path)), found, 1024
            )


def test_a_target_that_says_one_thing(
    tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be asked for ever."""
    Answers(monkeypatch, found.tokenizer, ["same"])
    with pytest.raises(
        TrainingError,
        match=r"too few turns that can be used: \d of \d+ were kept \(left out: .*repeat",
    ):
        self_prompts.write_prompts(chosen(tmp_path), found, 1024)


def test_other_settings_are_not_mixed_with(
    tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers(monkeypatch, found.tokenizer)
    self_prompts.write_prompts(chosen(tmp_path), found, 1024)
    with pytest.raises(
        RunError, match=r"begun by the stage prompts with self_temperature 1.0 \(now 0.7\)"
    ):
        self_prompts.write_prompts(chosen(tmp_path, self_temperature=0.7), found, 1024)


@pytest.mark.parametrize(
    "asked", [("self:",), ("self:1",), ("self:x",), ("self:-3",), ("self:5", "self:6"), ("self:²",)]
)
def test_what_is_no_number(asked: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="give self:N once, with N at least 2"):
        chosen(Path("o"), prompts=asked)


@pytest.mark.slow
def test_damaged(tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the stage in every way: it ends with the same prompts, or says which file and
    what to do."""
    answers, settings, faults = (
        Answers(monkeypatch, found.tokenizer),
        chosen(tmp_path / "run"),
        list[str](),
    )
    self_prompts.write_prompts(settings, found, 1024)
    expected = self_prompts.path_of(settings).read_bytes()
    finished = copy_of(tmp_path / "run", tmp_path / "finished")
    stopped = copy_of(tmp_path / "run", tmp_path / "stopped")
    for name in ("prompts.json", "prompts.jsonl"):
        (stopped / "prompts" / name).unlink()
    answers.written, answers.most = 0, 10**6
    for state in (stopped, finished):
        for file in sorted(path.name for path in (state / "prompts").iterdir()):
            for damage, apply in DAMAGES.items():
                path = copy_of(state, tmp_path / "run") / "prompts" / file
                if not apply(path):
                    continue
                try:
                    self_prompts.write_prompts(settings, found, 1024)
                    self_prompts.as_files(settings)
                    same = self_prompts.path_of(settings).read_bytes() == expected
                    faults += (
                        []
                        if same
                        else [f"{state.name} {file}, {damage}: other prompts, without a word"]
                    )
                except RunError as refusal:
                    if path.stem not in str(refusal) or "remove" not in str(refusal):
                        faults.append(f"{state.name} {file}, {damage}: {refusal}")
                except Exception as error:
                    faults.append(f"{state.name} {file}, {damage}: {error!r}")
    assert not faults, "\n".join(faults)

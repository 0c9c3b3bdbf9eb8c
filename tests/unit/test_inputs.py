"""What a command is given to read is a regular file, and refused by name before it is opened.

``train --prompts`` waited for ever on a pipe that nobody wrote to.

    pytest tests/unit/test_inputs.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_dflash.cli import main
from vllm_dflash.cluster import parts
from vllm_dflash.evaluation.workload import dataset_prompts, file_prompts
from vllm_dflash.prompts import load_prompts
from vllm_dflash.training.prompts import Reader
from vllm_dflash.training.self_prompts import openings
from vllm_dflash.training.settings import load
from vllm_dflash.training.tables import SelfPrompts

TARGET = Path(__file__).parents[2] / "examples" / "embedded_pair" / "target"
READ: dict[str, Callable[[str], object]] = {
    "doctor's prompts": lambda path: load_prompts(path, 1, None, 8),
    "bench's prompts": lambda path: file_prompts(path, None, 8),
    "bench's data sets": lambda path: dataset_prompts("gsm8k", path, None, 8),
    "training's prompts": lambda path: list(Reader(None, 8, "{}").read(path)),
    "openings": lambda path: openings(SelfPrompts(self_openings=path)),
    "settings": lambda path: load(path, {}),
    "batch's rows": lambda path: parts.index([path], 8),
    "batch's Parquet": lambda path: parts.index([path], 8),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_input_that_is_no_regular_file(tmp_path: Path, kind: str, what: str) -> None:
    path = tmp_path / ("in.parquet" if "Parquet" in what else "in.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((ValueError, RuntimeError)) as error:
        READ[what](str(path))
    assert str(path) in str(error.value)
    assert f"it is a {kind}, not a regular file" in str(error.value)


@pytest.mark.timeout(60)
def test_doctor_says_so_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said of a pipe that it is not there."""
    os.mkfifo(tmp_path / "in")
    given = ["doctor", "--target", "T", "--draft", "D", "--prompts", str(tmp_path / "in")]
    assert main(given) == 2
    assert "it is a pipe, not a regular file" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "given",
    [
        {"--prompts": "/dev/zero"},
        {"--prompts": "absent.jsonl"},
        {"--prompts": "good.jsonl", "--held-out-prompts": "/dev/zero"},
        {"--prompts": "self:8", "--self-openings": "/dev/zero"},
        {"--prompts": "good.jsonl", "--target": "./absent"},
    ],
    ids=["device", "absent", "held out", "openings", "target"],
)
def test_train_makes_no_folder_for_what_it_refuses(
    tmp_path: Path,
    given: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It left a run folder with the settings of the refused run."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"prompt_token_ids": [1, 2]}\n')
    flags = {"--target": str(TARGET), "--out": "run"} | given
    assert main(["train", *(part for flag in flags.items() for part in flag)]) == 1
    assert "vllm-dflash train: " in capsys.readouterr().err
    assert not Path("run").exists()

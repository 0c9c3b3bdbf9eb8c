"""``vllm-dflash refresh`` on a tiny pair, killed in every stage, stopped, and out of disk.

pytest tests/unit/test_follow_kills.py
"""

import os
import signal
from pathlib import Path

import pytest

from refreshes import ROUND, Pair, command, kill_at, same
from vllm_dflash.cli import main
from vllm_dflash.files import RunError
from vllm_dflash.follow import take
from vllm_dflash.follow.rounds import Rounds
from vllm_dflash.training.loop import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("reference_answers")]

STAGES = (
    "rounds/0001/traffic.jsonl",
    ROUND,  # begun
    "rounds/0001/run/generate/split.json",
    "rounds/0001/run/generate/held-out/shard-00000.safetensors",
    ROUND,  # the old drafter is measured
    "rounds/0001/run/train/checkpoints/step-00000006.json",
    "rounds/0001/run/train/drafter",
    "rounds/0001/run/train/result.json",
    ROUND,  # the new one is measured
    "rounds/0001/run/prove.json",
    "rounds/0001/run/drafter",
    "rounds/0001/run/drafter/refresh.json",
    ROUND,  # decided
)
"""What gets its name in a round, in this order."""


def test_killed_in_every_stage(pair: Pair, undisturbed: Path, tmp_path: Path) -> None:
    """As each file would get its name: the same command goes on, comes to the next one, and ends
    with the bits of one that was not killed."""
    out = tmp_path / "out"
    asked = command(pair, out)
    for name in STAGES:
        assert kill_at(out / name, asked) == -signal.SIGKILL, f"it never came to write {name}"
        assert not (out / "drafter").exists(), "it is not decided"
    assert main(asked) == 0
    assert same(out / "drafter", undisturbed / "drafter")
    assert len(Rounds(out).all()) == 1


@pytest.mark.parametrize("name", ["drafter", "journal.txt"])
def test_killed_after_the_decision(
    pair: Pair, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    """What was decided is so, and the next round follows; a journal's line is of the one round."""
    out = tmp_path / "out"
    asked = command(pair, out)
    assert kill_at(out / name, asked) == -signal.SIGKILL, f"it never came to write {name}"
    link = out / "drafter"
    assert not link.exists() or (link / "refresh.json").is_file(), "whole, or not there"
    assert main(asked) == 0
    assert same(out / "drafter", undisturbed / "drafter")
    assert len(Rounds(out).all()) == 1 + (name == "drafter"), "that one was decided already"


def test_ctrl_c(
    pair: Pair,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In training: one line, a checkpoint, and the same bits in the end."""
    out, step = tmp_path / "out", Trainer.step

    def stopped(self: Trainer, number: int) -> dict[str, float]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert main(command(pair, out)) == 130
    said = capsys.readouterr().err
    assert "vllm-dflash refresh: stopped;" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert (out / "rounds/0001/run/train/checkpoints/step-00000003.json").is_file()
    assert main(command(pair, out)) == 0
    assert same(out / "drafter", undisturbed / "drafter")


def test_a_full_disk(
    pair: Pair,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said with the remedy; what was kept before stays, and the same command goes on."""
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise RunError("the disk is full: free some space")

    with monkeypatch.context() as patch:
        patch.setattr(take, "write_record", full)
        assert main(command(pair, out)) == 1
    assert "free some space" in capsys.readouterr().err
    assert not (out / "drafter").exists()
    assert main(command(pair, out)) == 0
    assert same(out / "drafter", undisturbed / "drafter")

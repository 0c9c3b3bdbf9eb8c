"""One command at a time in a run folder; of two that began at once, one once ended with a
FileNotFoundError on the other's ``.part``."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from vllm_dflash.files import RunError
from vllm_dflash.lock import hold


def held_by_another(folder: Path):
    """A process that holds the folder until it is killed."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        with hold(folder, "vllm-dflash train"):
            theirs.send("held")
            signal.pause()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert ours.poll(20)
    return process


def test_who_holds_it_is_said(tmp_path: Path) -> None:
    """And once it is killed, hard, nothing is left to be removed by hand."""
    process = held_by_another(tmp_path / "run")
    words = (
        rf"run is in use by vllm-dflash train, process {process.pid} on \S+ since 20\d\d-\S+: wait"
        r" for its end, stop it, or choose"
    )
    with pytest.raises(RunError, match=words), hold(tmp_path / "run", "vllm-dflash train"):
        pass
    process.kill()
    process.join()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == process.pid
    with hold(tmp_path / "run", "vllm-dflash batch"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())
    with hold(tmp_path / "run", "again"):
        pass


def test_a_lock_that_says_nothing(tmp_path: Path) -> None:
    process = held_by_another(tmp_path)
    (tmp_path / "lock").write_bytes(b"\xff")
    with (
        pytest.raises(RunError, match="is in use by another command: wait"),
        hold(tmp_path, "train"),
    ):
        pass
    process.kill()
    process.join()


def test_something_else_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(
            RunError, match=r"lock cannot be written \(Is a directory\): remove or move what is at"
        ),
        hold(tmp_path, "train"),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is no folder"), hold(tmp_path / "file", "train"):
        pass

"""The programs of ``tests/gpu`` at their tiny size: engines of the V2 runner through Triton's
interpreter, with a process for each as on a GPU.

What is in their figures is checked where a CPU can say it: drafts are plain PyTorch's, token for
token. Speeds say nothing here.

    pytest tests/engine/test_gpu_programs.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import forks
from engine.harness import ROOT, engine_env

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def run(name: str, folder: Path, *more: str, fork: bool = True) -> dict[str, Any]:
    """The record of a program's run, which has to end well.

    ``fork``: the program and its engines are forks of a process that has vLLM imported; else each
    is started as a user's is.
    """
    script = ROOT / "tests" / "gpu" / f"{name}.py"
    flags = ["--tiny", "--out", str(folder / "out"), "--work", str(folder / "work"), *more]
    log = folder / "log"
    if fork:
        files = {0: Path(os.devnull), 1: log}
        status = forks.start([str(script), *flags], engine_env(), files, forks.INTERPRETER).wait()
    else:
        with log.open("w") as output:
            status = subprocess.run(
                [sys.executable, str(script), *flags],
                cwd=folder,
                env=engine_env(),
                stdout=output,
                stderr=output,
                check=False,
            ).returncode
    logs = [path.read_text()[-3000:] for path in (log, *folder.glob("work/*/logs/*.log"))]
    assert status == 0, "\n".join(logs)
    (path,) = (folder / "out").glob(f"{name}-*-tiny.json")
    return json.loads(path.read_text())


def ran(record: dict[str, Any]) -> dict[str, Any]:
    """The figures that there are."""
    return {name: f for name, f in record["figures"].items() if f["state"] == "ran"}


def test_right_drafts(tmp_path: Path) -> None:
    """Also what an engine says of itself: ours, on the V2 runner."""
    record = run("right_drafts", tmp_path, "--only", "wide K|dflare")
    found = ran(record)
    assert set(found) == {"dflare graphs, 2 requests", "wide K below the block, 2 requests"}
    for figure in found.values():
        assert figure["tokens"] >= 100
        assert figure["same"] == 1.0
        assert figure["anchors_wrong"] == 0
        assert figure["near_end_tokens"] > 0
    # Synthetic acceptance takes drafts of random weights in all lengths.
    assert found["wide K below the block, 2 requests"]["tau"] > 1.3
    assert found["dflare graphs, 2 requests"]["tau"] > 1.5
    engine = record["engines"]["dflare graphs"]
    assert engine["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
    assert engine["speculator"] == "vllm_dflash.drafting.v2.DFlashSpeculator"


def test_second_start(tmp_path: Path) -> None:
    """A drafter with an lm_head over half of the vocabulary and a mask embedding."""
    found = ran(run("second_start", tmp_path, "--only", "own tables", fork=False))
    assert found["own tables under graphs"]["same"] == 1.0
    assert found["own tables under graphs"]["tokens"] >= 100


def test_step_time(tmp_path: Path) -> None:
    """Stock vLLM beside ours."""
    record = run("step_time", tmp_path, "--only", "native:15|dflash:15")
    found = ran(record)
    for method in ("native:15", "dflash:15"):
        assert found[f"2 requests, {method}, repeat 1"]["steps"] >= 3
        assert found[f"2 requests, {method}, repeat 1"]["tau"] > 1.2
    assert record["engines"]["native:15"]["speculator"].startswith("vllm.")
    assert record["engines"]["dflash:15"]["speculator"].startswith("vllm_dflash.")


def test_profile_step(tmp_path: Path) -> None:
    """Each part of a step was seen on the host; there are no kernels here."""
    found = ran(run("profile_step", tmp_path, "--only", "dflash, |parts|metrics"))
    parts = found["dflash, 2 requests"]["parts"]
    for part in ("schedule", "execute_model", "sample_tokens", "propose", "update_from_output"):
        assert parts[part]["host_us"] > 0, part
    assert all(
        isinstance(found["parts of a draft, 2 requests"][part], float)
        for part in (
            "context to keys and values",
            "blocks moved to max_model_len",
            "lm_head and best token",
        )
    )
    assert "cost of metrics, 2 requests" in found


def test_load(tmp_path: Path) -> None:
    """Contexts that a connector fills in, and an acceptance that changes from cell to cell."""
    record = run("load", tmp_path, "--only", "fixed|0.6, adaptive")
    found = ran(record)
    often, seldom = (
        found[f"3 requests, context 16, acceptance {rate}, fixed"]["tau"] for rate in (0.6, 0.05)
    )
    assert often > 1.4 > seldom
    assert found["3 requests, context 16, acceptance 0.6, adaptive"]["steps"] >= 3
    assert record["engines"]["adaptive"]["scheduler"].startswith("vllm_dflash.")
    profile = record["engines"]["adaptive"]["profile"]
    assert min(profile["target"]) > 0
    assert record["engines"]["fixed"]["profile"] is None
    said = (tmp_path / "log").read_text()
    assert "adaptive has measured its steps: ms by rows, target 1:" in said
    assert record["engines"]["fixed"]["scheduler"].startswith("vllm.")

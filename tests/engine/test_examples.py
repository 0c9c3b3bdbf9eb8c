"""The examples run as they stand."""

import subprocess
import sys

import pytest

from engine.harness import ROOT, engine_env

pytestmark = pytest.mark.engine


def test_demo() -> None:
    """Part one of ``make demo`` at a small scale: outputs are identical, and the report says what
    was measured."""
    command = [
        sys.executable,
        "examples/demo.py",
        "--prompts",
        "3",
        "--tokens",
        "48",
        "--rounds",
        "1",
        "--no-serve",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=engine_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "outputs identical: 3 of 3" in done.stdout
    assert "tokens per target forward, of at most 8" in done.stdout

"""The examples run as they stand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import forks
from engine.harness import ROOT, engine_env

pytestmark = pytest.mark.engine


def test_demo() -> None:
    """Part one of ``make demo`` at a small scale: outputs are identical, and the report says what
    was measured."""
    command = [
        sys.executable,
        "examples/demo.py",
        "--pair",
        "tiny",
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


CHAT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import demo
from vllm_dflash import smollm2
target = Path(sys.argv.pop(1))
smollm2.folder = lambda: target
sys.exit(demo.main())
"""
"""The demo with another chat model in SmolLM2's place."""


def test_demo_of_a_chat_model(tmp_path: Path) -> None:
    """What SmolLM2 runs, without its package: the embedded pair with a chat template. One and eight
    at a time, code and everyday questions apart."""
    pair = ROOT / "examples" / "embedded_pair"
    target = shutil.copytree(pair / "target", tmp_path / "target")
    (target / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    )
    flags = ["--draft", str(pair / "dflash"), "--prompts", "2", "--tokens", "24", "--no-serve"]
    script, log = tmp_path / "chat.py", tmp_path / "log"
    script.write_text(CHAT)
    command = [str(script), str(ROOT / "examples"), str(target), *flags, "--whole-drafts"]
    status = forks.start(command, engine_env(), {0: Path(os.devnull), 1: log}).wait()
    said = log.read_text()
    assert status == 0, said
    lines = [line for line in said.splitlines() if "tokens/s" in line]
    loads = [line.partition(": ")[0] for line in lines]
    assert loads == [
        "Python tasks, one at a time",
        "everyday questions, one at a time",
        "Python tasks, 8 at a time",
        "everyday questions, 8 at a time",
    ]
    for line, count in zip(lines, (2, 2, 8, 8), strict=True):
        assert line.endswith(f"identical {count} of {count}")
        assert " x, tau " in line
    assert "\nAll outputs are identical.\n" in said

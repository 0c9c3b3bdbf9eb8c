import io
import time

import pytest

from vllm_dflash import progress
from vllm_dflash.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_long_work_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target answered training's prompts for 45 minutes and printed nothing into a job's
    log."""
    monkeypatch.setattr(progress, "_SECONDS", 0.05)
    log = io.StringIO()
    with Progress(total=20, desc="generate", unit=" answers", file=log, leave=False) as bar:
        for _ in range(20):
            time.sleep(0.02)
            bar.update()
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 10
    assert all(line.startswith("generate: ") and "/20" in line for line in lines)
    assert "20/20" in lines[-1]
    assert "\r" not in log.getvalue()


def test_short_work_says_nothing_there() -> None:
    log = io.StringIO()
    with Progress(total=2, file=log) as bar:
        bar.update(2)
    assert log.getvalue() == ""


def test_a_terminal_has_a_bar() -> None:
    terminal = Terminal()
    with Progress(total=2, file=terminal) as bar:
        bar.update(2)
    assert terminal.getvalue().count("\r") >= 2
    assert "2/2" in terminal.getvalue()

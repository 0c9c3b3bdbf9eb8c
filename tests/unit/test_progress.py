import io
import time

import pytest
import tqdm.std

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


def test_the_last_line_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that ended with a line had it twice in the log: the bar's end printed it again. What was
    written beside it brought an empty line and a line of its own."""
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    log = io.StringIO()
    with Progress(total=3, file=log) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.update()
        bar.clear()
        bar.refresh()
    lines = log.getvalue().splitlines()
    assert [line.partition("| ")[2].partition(" ")[0] for line in lines] == ["1/3", "2/3", "3/3"]


def test_what_stands_beside_the_bar_brings_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, which shows the loss, printed a line a step."""
    monkeypatch.setattr(progress, "_SECONDS", 0.05)
    log = io.StringIO()
    with Progress(total=50, desc="train", file=log) as bar:
        for step in range(50):
            time.sleep(0.005)
            bar.update()
            bar.set_postfix_str(f"loss {step}")
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 10
    assert "50/50" in lines[-1]
    assert "loss 49" in lines[-1]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_clock_that_is_set_back_keeps_nothing_from_the_log(
    monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    """After the machine's clock was set back an hour nothing was printed for an hour, and the rate
    was nonsense."""
    monkeypatch.setattr(progress, "_SECONDS", 0.05)
    log, clock, back = kind(), time.time, [0.0]
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: clock() - back[0])
    with Progress(total=40, desc="generate", file=log, mininterval=0.05) as bar:
        back[0] = 3600.0
        for _ in range(40):
            time.sleep(0.01)
            bar.update()
        assert any(f" {n}/40" in log.getvalue() for n in range(1, 40))
    assert "[-" not in log.getvalue()
    assert "59:" not in log.getvalue()


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

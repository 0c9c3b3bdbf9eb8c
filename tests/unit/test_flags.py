"""Every number that a command's flag cannot be is refused at once, and so is an empty text.

``up --print-config`` took ports and counts below zero; ``bench --concurrency 1000000000`` and
``up --tensor-parallel-size 99999999`` filled the memory before anything looked at them.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dflash.cli import main, parser_of_all
from vllm_dflash.evaluation.workload import PromptSet
from vllm_dflash.flag_types import address
from vllm_dflash.training.settings import every_field

PAIR = Path(__file__).resolve().parents[2] / "examples" / "embedded_pair"
MODELS = ["--target", str(PAIR / "target"), "--draft", str(PAIR / "dflash")]
ALONE = {
    "bench": [],
    "doctor": [*MODELS, "--skip-vllm"],
    "top": ["http://127.0.0.1:9"],
    "batch": [str(PAIR / "prompts.jsonl"), *MODELS, "--device", "cpu", "--out", "out"],
    "up": [*MODELS, "--device", "cpu", "--print-config"],
    "train": ["--target", str(PAIR / "target"), "--prompts", "x", "--out", "out", "--dry-run"],
    "refresh": [*MODELS, "--prompts", "x", "--out", "out"],
}
"""What else each command needs, so that nothing but the flag is at fault."""
NUMBERS = {"N", "K", "S", "X", "N|LOW-HIGH", "N or MIN,MAX", "LIST"}
IMPOSSIBLE = ("-1", "0", "9" * 30, "9" * 5000, "nan", "")
ZERO_IS_ONE = {"--temperature", "--slice", "--max-errors"}


def commands() -> dict[str, argparse.ArgumentParser]:
    [chosen] = [
        action
        for action in parser_of_all()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(chosen.choices)


def flags(command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in command._actions:
        if action.option_strings and action.nargs != 0:
            yield action.option_strings[-1], action


def numbers() -> Iterator[tuple[str, str, str]]:
    of_zero = {
        f"--{item.name.replace('_', '-')}": item.metadata["least"] for _, item in every_field()
    }
    for name, command in commands().items():
        for flag, action in flags(command):
            if action.metavar in NUMBERS and flag != "--methods":
                for value in IMPOSSIBLE:
                    least = of_zero.get(flag) if name == "train" else None
                    is_one = value == "0" and (
                        flag in ZERO_IS_ONE or (name == "train" and (least or 0) <= 0)
                    )
                    if not is_one:
                        yield name, flag, value


def ended(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the commands import once a process is no part of the time that a refusal takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("imports"))
        ended(["train", *ALONE["train"], "--target-layer-ids=-1"])


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [pytest.param(*case, id="=".join(case)[:60]) for case in numbers()],
)
def test_a_number_that_cannot_be(
    command: str,
    flag: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    assert ended([command, *ALONE[command], f"{flag}={value}"]) in (1, 2)
    assert time.process_time() - began < 5
    said = capsys.readouterr().err
    assert flag in said or flag.removeprefix("--").replace("-", "_") in said
    assert not list(tmp_path.iterdir())


def texts() -> Iterator[tuple[str, str]]:
    for name, command in commands().items():
        for flag, action in flags(command):
            if action.metavar not in NUMBERS and not action.choices and name != "train":
                yield name, flag


@pytest.mark.parametrize(("command", "flag"), texts())
def test_an_empty_text(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``up --target ''`` served the folder that one stood in, and ``--host ''`` every address."""
    monkeypatch.chdir(tmp_path)
    needed = {"compat": ["--source", "new"], "convert": ["a", "b", "--to", "speculators"]}
    alone = ALONE.get(command, needed.get(command, []))
    assert ended([command, *alone, f"{flag}="]) in (1, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "ftp://h:1", "http://", "http://[", "file:///etc/passwd"])
def test_what_is_no_address(text: str) -> None:
    """``swap --server ftp://...`` waited for ever."""
    with pytest.raises(argparse.ArgumentTypeError, match="give one such as http://"):
        address(text)


@pytest.mark.parametrize("text", ["h:1", "127.0.0.1", "https://h/v1", "http://[::1]:8000"])
def test_an_address(text: str) -> None:
    assert address(text) == text


def test_the_longest_prompt_is_known_before_any_is_made() -> None:
    prompts = PromptSet("three", [[1], [2, 3, 4], [5, 6]])
    for count in (1, 2, 7):
        for length in (None, 2, 5):
            made = prompts.take(count, length)
            assert prompts.longest(count, length) == max(map(len, made))
    assert prompts.longest(1 << 60, 1 << 60) == 1 << 60

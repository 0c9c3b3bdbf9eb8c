"""What ``--help`` says is so: of choices all, of defaults those that the flags have.

pytest tests/unit/test_help.py
"""

import argparse
import ast
import re
from pathlib import Path

import pytest

from vllm_dflash import kinds
from vllm_dflash.cli import parser_of_all
from vllm_dflash.formats import format_names

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *sorted((ROOT / "vllm_dflash" / "cli").glob("*.py")),
    ROOT / "vllm_dflash/cluster/command.py",
]


def command(name: str) -> argparse.ArgumentParser:
    [chosen] = [
        action
        for action in parser_of_all()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    found: argparse.ArgumentParser = chosen.choices[name]
    return found


def said(parser: argparse.ArgumentParser, flag: str) -> str:
    return str(parser._option_string_actions[flag].help)


def test_train_explains_every_head() -> None:
    """``correction`` was a choice that its text did not name."""
    text = said(command("train"), "--head")
    assert [name for name in kinds.head_names() if name not in text] == []


def test_convert_names_every_format_with_its_kinds() -> None:
    """It knew two kinds of fourteen: by it, no format held a DSpark or DFly drafter."""
    text = " ".join(str(command("convert").description).split())
    for format in format_names():
        assert format in text
    for kind in kinds.every().values():
        assert re.search(rf"{re.escape(kind.format)} \([^)]*\b{re.escape(kind.name)}\b", text)


@pytest.mark.parametrize("path", FLAGS, ids=lambda path: path.stem)
def test_a_default_is_named_once(path: Path) -> None:
    """Each stood in ``default`` and again in the text, which nobody would have changed with it."""
    repeated = [
        ast.unparse(keyword.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "help" and re.search(r"default: (?!4 x)[\d']", ast.unparse(keyword.value))
    ]
    assert repeated == []


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["bench"], "concurrency", [1, 8]),
        (["bench"], "temperature", [0.0]),
        (["top", "URL"], "interval", 2.0),
        (["refresh", "--out", "o"], "minutes", 15.0),
        (["batch", "a", "--out", "o", "--target", "t"], "temperature", 0.0),
    ],
)
def test_a_default_that_is_text_is_read_as_its_flag_is(
    words: list[str], name: str, value: object
) -> None:
    assert vars(parser_of_all().parse_args(words))[name] == value

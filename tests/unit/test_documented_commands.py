"""The commands that the documents print are commands of today: the flags, settings, extras and
files that they name exist.

Nothing is run. Output that a document shows beside a command is not looked at.

    pytest tests/unit/test_documented_commands.py
"""

import argparse
import ast
import functools
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from vllm_dflash.cli import COMMANDS
from vllm_dflash.evaluation.methods import Drafter, parse_methods
from vllm_dflash.training.errors import SettingsError
from vllm_dflash.training.settings import load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        *(p for d in ("docs", "examples") for p in ROOT.glob(f"{d}/**/*.md")),
    )
)
_COMMAND = re.compile(
    r"(?:\$ )?(?:[A-Z_0-9]+=\S* )*(?:\S*/)?(?:vllm-dflash|vllm|python[\d.]*|pip) "
)
_VARIABLE = re.compile(r"[A-Z_0-9]+=")
_NOT_SETTINGS = ("run", "settings", "only", "dry_run", "keeps_name")


def fenced(text: str) -> Iterator[list[str]]:
    """The words of each command in the code blocks of a document."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        while lines:
            line = lines.pop(0).strip()
            if not _COMMAND.match(line):
                continue
            while (words := split(line)) is None:  # a quotation that goes on in the next line
                line += "\n" + lines.pop(0)
            yield from commands(words)


def split(line: str) -> list[str] | None:
    """Words as a shell has them, without comments; None where a quotation is open."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return None


def commands(words: list[str]) -> Iterator[list[str]]:
    """Each of those that && joins, without variables before it."""
    one: list[str] = []
    for word in [*words, "&&"]:
        if word == "&&":
            yield one
            one = []
        elif one or not (word == "$" or _VARIABLE.match(word)):
            one.append(word)


def in_text(text: str) -> Iterator[list[str]]:
    """The words of each `vllm-dflash COMMAND ...` in a document's sentences."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`(vllm-dflash [^`]+)`", prose):
        yield shlex.split(" ".join(span.split()))


@functools.cache
def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's, and those of its commands by name."""
    whole = argparse.ArgumentParser(prog="vllm-dflash")
    each = whole.add_subparsers(required=True)
    for one in COMMANDS:
        one.add(each)
    return whole, dict(each.choices)


def check_flags(words: list[str]) -> None:
    """Of a command that is not given in full: its name, and the flags that it names."""
    name, *rest = words
    known = parsers()[1].get(name)
    assert known is not None, f"there is no vllm-dflash {name}"
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--"):
            assert flag in known._option_string_actions, f"vllm-dflash {name} has no {flag}"


def check_ours(words: list[str]) -> None:
    if "..." in words:
        check_flags(words)
        return
    try:
        args = vars(parsers()[0].parse_args(words))
    except SystemExit:
        pytest.fail(f"vllm-dflash refuses {shlex.join(words)}")
    if words[0] == "train" and args["settings"] is None:
        load(None, {name: value for name, value in args.items() if name not in _NOT_SETTINGS})


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] == "venv" or find_spec(words[1]) is not None, f"no module {words[1]}"
    elif words[0].endswith(".py"):
        path = ROOT / words[0].replace("$pair", "examples/embedded_pair")
        known = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for word in words:
            assert not word.startswith("--") or word in known, f"{path.name} has no {word}"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for before, word in zip(["", *words], words):
        if before == "-r":
            assert (ROOT / word).is_file(), f"no file {word}"
        elif named := re.search(r"\[(.+)\]$", word):
            assert set(named[1].split(",")) <= extras.keys(), f"{word}: no such extra"


def check_vllm(words: list[str]) -> None:
    for before, word in pairwise(words):
        if before == "--speculative-config":
            assert {"method", "model"} <= json.loads(word).keys()


CHECKS = {"vllm-dflash": check_ours, "pip": check_pip, "vllm": check_vllm}


def check(text: str) -> None:
    """Each command in a document's code blocks."""
    for program, *words in fenced(text):
        name = Path(program).name
        if name in CHECKS or name.startswith("python"):
            CHECKS.get(name, check_python)(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_a_document_says_to_type(document: Path) -> None:
    text = (ROOT / document).read_text()
    check(text)
    for _, *words in in_text(text):
        check_flags(words)


@pytest.mark.parametrize(
    "command",
    [
        "vllm-dflash train --target T --prompts P --out R --learning-rate 1",
        "vllm-dflash train --target T --prompts P --out R --lr fast",
        "vllm-dflash bench --brek-even ...",
        "vllm-dflash serve T",
        "python examples/smollm2/eagle3/train_eagle3.py RUN --outt HEAD",
        "X=1 python -m vllm_dflash.smollm3",
        "pip install '.[cpu,smollm3]' && python -m vllm_dflash.install_cpu",
        "pip install -r examples/smollm2/requirements.txt",
        'vllm serve T --speculative-config \'{"method": "dflash",\n "modell": "D"}\'',
    ],
)
def test_a_wrong_one_is_seen(command: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, SettingsError)):
        check(f"```\n{command}\n```\n")


def test_the_documents_hold_commands() -> None:
    """The looking itself: two that are known, one of them over several lines."""
    found = [" ".join(words) for words in fenced((ROOT / "README.md").read_text())]
    assert "vllm-dflash inspect DRAFTER" in found
    assert any(
        line.startswith("vllm serve Qwen/Qwen3-8B") and line.endswith('DFlash-b16"}')
        for line in found
    )


def test_what_the_report_on_smollm2_runs() -> None:
    """The script with a program in the place of ``bench`` that prints what it is given."""
    folder = ROOT / "examples" / "smollm2"
    given = {"BENCH": r"printf %s\n", "EAGLE3": "HEAD"}
    said = subprocess.run(
        [folder / "report.sh", "--repeats", "1"],
        env=os.environ | given,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    args = parsers()[0].parse_args(["bench", *said])
    assert args.repeats == 1
    assert all((folder / name).is_file() for name in args.prompts)
    drafters = {"": Drafter("DRAFTER", 7)}
    kinds = [method.kind for method in parse_methods(args.methods, drafters, args.eagle3)]
    assert {"plain", "dflash", "adaptive", "native", "ngram", "eagle3"} <= set(kinds)

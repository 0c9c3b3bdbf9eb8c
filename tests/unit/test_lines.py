"""Lines of documents, scripts and settings have up to 100 characters, as those of code have by the
linter.

In Markdown that is said of prose and of commands alone: a table's row, a program's output and a
link cannot be broken.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 100
FOLDERS = ("docs", "examples", "monitoring", "patches", "tests", "vllm_dflash")
GENERATED = {ROOT / "examples" / "embedded_pair" / "bench" / "report.md"}
"""By `vllm-dflash bench`: what was run, a line each."""
COMMAND = re.compile(r"\s*(\$ |#|(\S*/)?(vllm|vllm-dflash|python|pip|pytest|make|bash|curl) |--)")


def files(*patterns: str) -> list[Path]:
    """Those of the checkout, without what tools unpack into it."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    for folder in FOLDERS:
        found += [path for pattern in patterns for path in (ROOT / folder).rglob(pattern)]
    return sorted(
        {path for path in found if not {"node_modules", "run"} & set(path.parts)} - GENERATED
    )


def too_long(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a Markdown text that could be shorter, counted from 1."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif len(line) <= LIMIT or line.lstrip().startswith("|"):
            continue
        elif COMMAND.match(line) if is_code else len(line.split()) > 1 + line.startswith("- "):
            yield number, line


@pytest.mark.parametrize("path", files("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_documents_are_short(path: Path) -> None:
    """docs/features.md had paragraphs of 150 characters a line."""
    assert list(too_long(path.read_text())) == []


def test_lines_of_scripts_and_settings_are_short() -> None:
    """Those in monitoring/ are queries and the sentences of alerts, one a line."""
    paths = [
        *files("*.sh", "*.toml", "*.yaml"),
        *(ROOT / name for name in ("Makefile", "mkdocs.yml", ".pre-commit-config.yaml", ".ci/run")),
        *(ROOT / ".github").rglob("*.yml"),
    ]
    assert {path.name for path in paths} >= {"make.sh", "pyproject.toml", "rayjob.yaml", "ci.yml"}
    long = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        if "monitoring" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LIMIT
    }
    assert long == set()


def test_what_cannot_be_broken_may_be_long() -> None:
    long = "x" * LIMIT
    assert not list(too_long(f"[a]({long})\n- [a]({long})\n| a | {long} |\n```\n12 {long}\n```\n"))
    assert (
        len(list(too_long(f"a {long}\n- a {long}\n```\n$ a {long}\nvllm serve {long}\n```\n"))) == 4
    )

"""docs/architecture.md: its links lead to the definitions that it names, and it answers four
questions of a newcomer."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
LINKS = re.findall(r"\[`([^`]+)`\]\(([^)#]+)\)", PAGE.read_text())


def defined(path: Path) -> set[str]:
    """Names of a module's functions, classes, methods (``Class.method`` too) and constants."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            names |= {node.name, *methods, *(f"{node.name}.{name}" for name in methods)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("name", "target"), LINKS)
def test_a_link_leads_to_what_it_names(name: str, target: str) -> None:
    path = (PAGE.parent / target).resolve()
    assert path.is_file()
    if name.endswith((".py", ".md")):
        assert path == ROOT / name or path == ROOT / "vllm_dflash" / name
    else:
        assert name in defined(path)


@pytest.mark.parametrize(
    ("question", "answer", "file"),
    [
        ("where is a draft laid out?", "block_layout", "vllm_dflash/drafting/layout.py"),
        ("where is a draft laid out?", "end_blocks_at", "vllm_dflash/drafting/layout.py"),
        ("where is it verified on a CPU?", "Verifier", "vllm_dflash/cpu/verification.py"),
        ("where does a GPU's graph record?", "_generate_draft", "vllm_dflash/drafting/v2.py"),
        ("where is K chosen?", "Controller", "vllm_dflash/adaptive/controller.py"),
    ],
)
def test_a_newcomer_finds(question: str, answer: str, file: str) -> None:
    [row] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {question} |")]
    assert f"[`{answer}`](../{file})" in row


def test_the_tests_that_a_docstring_names_exist() -> None:
    """One named a file that there has never been: nobody could run what it promised."""
    modules = [path for name in ("vllm_dflash", "patches") for path in (ROOT / name).rglob("*.py")]
    named = {
        (path.name, test)
        for path in modules
        for test in re.findall(
            r"tests/[\w/]+\.py", ast.get_docstring(ast.parse(path.read_text())) or ""
        )
    }
    assert len(named) > 100
    assert [(where, test) for where, test in named if not (ROOT / test).is_file()] == []


def test_every_folder_has_a_room() -> None:
    rooms = PAGE.read_text().partition("## What a GPU runs")[0]
    folders = [path.parent.name for path in (ROOT / "vllm_dflash").glob("*/__init__.py")]
    assert [name for name in folders if f"`{name}/`" not in rooms] == []
    files = [path.name for path in (ROOT / "vllm_dflash").glob("*.py")]
    assert [name for name in files if f"`{name}`" not in rooms and name != "__init__.py"] == []


def test_the_column_of_imports_is_right() -> None:
    """``no``: no file of the row names vLLM; ``late``: some do, inside of functions or in single
    modules; ``yes``: at the top of a module. The page said no of ``checks.py``, which asks vLLM's
    platform in a function."""
    rooms = PAGE.read_text().partition("## What a GPU runs")[0]
    rows = [row.strip("| ").split(" | ") for row in rooms.splitlines() if row.startswith("| `")]
    assert len(rows) > 15
    for names, _, said in rows:
        paths = [
            ROOT / ("" if "top-level" in entry else "vllm_dflash") / name
            for entry in names.split(", ")
            for name in re.findall(r"`([^`]+)`", entry)
        ]
        files = [
            file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])
        ]
        at_the_top, anywhere = (
            any(of_vllm(each(ast.parse(file.read_text()))) for file in files)
            for each in (lambda tree: tree.body, ast.walk)
        )
        known = {"no": not anywhere, "late": anywhere, "yes": at_the_top}
        assert known.get(said, at_the_top), (names, said)


def of_vllm(nodes: Iterable[ast.AST]) -> bool:
    """Whether one of these imports something of vLLM's."""
    return any(
        name.partition(".")[0] == "vllm"
        for node in nodes
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] * (not node.level)
            if isinstance(node, ast.ImportFrom)
            else []
        )
    )


def test_the_site_has_every_document() -> None:
    nav = re.findall(r": ([a-z]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))

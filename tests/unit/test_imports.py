"""Modules import each other one way, and so do rooms: a circle works or fails by which of its
modules comes first.

An import inside of a function runs later. Where one closes a circle the two know of each other all
the same: each such circle stands in ``LATE`` with its reason, and no other is allowed.

    pytest tests/unit/test_imports.py
"""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_dflash"
Graph = Mapping[str, set[str]]
LATE = {
    "config": (
        "DrafterConfig.from_dict and from_pretrained are the door to all formats, which are read"
        " into a DrafterConfig"
    ),
    "patches": (
        "a patch puts parts of ours in place, which are imported when vLLM is; those parts name the"
        " patch that they are of"
    ),
}
"""Modules, or all of a package, whose late imports close a circle: with why they have them."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module by its full name; a package by its own, for ``__init__``."""
    found = {}
    for name, folder in ((PACKAGE, ROOT / PACKAGE), (f"{PACKAGE}.patches", ROOT / "patches")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def _imports(
    node: ast.AST, late: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import with whether it runs later than its module; those for the type checker alone are
    none."""
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in (
        each
        for name in ("body", "orelse", "handlers", "finalbody")
        for each in getattr(node, name, [])
    ):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, late
        elif isinstance(child, ast.stmt | ast.ExceptHandler) and not (
            isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        ):
            yield from _imports(child, late)


def imported(trees: Mapping[str, ast.Module], *, late: bool) -> dict[str, set[str]]:
    """What each module imports of the others: when it is loaded, or ``late``. A module's package is
    loaded with it."""
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node, is_late in _imports(tree):
            if is_late != late:
                continue
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            else:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [each if each in trees else str(node.module) for each in whole]
            for each in named:
                parts = each.split(".")
                graph[name] |= {
                    parent
                    for i in range(len(parts))
                    if (parent := ".".join(parts[: i + 1])) in trees
                }
        graph[name] -= {name} | {parent for parent in trees if name.startswith(f"{parent}.")}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Modules that reach each other, by name: one list for each such group."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return sorted(map(list, groups))


def _rooms(graph: Graph) -> dict[str, set[str]]:
    """The same between folders; modules at the top belong to none."""

    def room(name: str) -> str:
        return name if name in packages else name.rpartition(".")[0]

    packages = {name.rpartition(".")[0] for name in graph} - {""}
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        rooms.setdefault(room(name), set()).update(
            room(other) for other in others if room(other) not in (room(name), PACKAGE)
        )
    rooms.pop(PACKAGE, None)
    return rooms


@functools.cache
def _graphs() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    return imported(modules(), late=False), imported(modules(), late=True)


def _without_late(names: Iterable[str]) -> dict[str, set[str]]:
    """What is imported at any time, but late by modules that are, or lie in, one of ``names``."""
    early, late = _graphs()
    whole = [f"{PACKAGE}.{name}" for name in names]
    return {
        each: (
            early[each]
            | (set() if any(f"{each}.".startswith(f"{name}.") for name in whole) else late[each])
        )
        for each in early
    }


@pytest.mark.slow
def test_no_circle_when_modules_are_loaded() -> None:
    assert circles(_graphs()[0]) == []


def test_no_circle_of_rooms_when_modules_are_loaded() -> None:
    assert circles(_rooms(_graphs()[0])) == []


def test_no_late_import_closes_a_circle_but_those_named_here() -> None:
    assert circles(_without_late(LATE)) == []


@pytest.mark.parametrize("name", LATE)
def test_what_is_named_closes_one(name: str) -> None:
    assert circles(_without_late(set(LATE) - {name})) != []


def test_circles_are_found() -> None:
    """Over modules, over a package that comes with its module, and late ones apart."""
    texts = {
        "p": "",
        "p.a": "from p.b import x",
        "p.b": "import p.c",
        "p.c": "def f():\n    from p import a",
        "q": "from r.s import x",
        "q.t": "",
        "r": "",
        "r.s": "from q.t import y",
        "u": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import v",
        "v": "import u",
    }
    trees = {name: ast.parse(text) for name, text in texts.items()}
    early, late = imported(trees, late=False), imported(trees, late=True)
    assert circles(early) == [["q", "r.s"]]
    assert circles({name: early[name] | late[name] for name in trees}) == [
        ["p.a", "p.b", "p.c"],
        ["q", "r.s"],
    ]

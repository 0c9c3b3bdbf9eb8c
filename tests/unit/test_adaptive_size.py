"""The controller stays small: lines of code, constants, and no number beside them.

pytest tests/unit/test_adaptive_size.py
"""

import ast
import io
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_dflash.adaptive.tuning import Tuning

FOLDER = Path(__file__).resolve().parents[2] / "vllm_dflash" / "adaptive"
CONTROLLER = sorted({*FOLDER.glob("*.py")} - {FOLDER / "scheduler.py", FOLDER / "settings.py"})
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code(source: str) -> int:
    """Lines of code: those without blank ones, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_what_counts_as_code() -> None:
    assert code('"""Says\nwhat."""\n\nx = [\n    1,  # one\n]\n# no\n"""Of x."""\n') == 3


def test_the_controller_has_three_hundred_lines_at_most() -> None:
    assert len(CONTROLLER) > 4
    assert sum(code(path.read_text()) for path in CONTROLLER) <= 300


def test_it_has_fewer_than_ten_constants() -> None:
    assert len(fields(Tuning)) < 10


@pytest.mark.parametrize("path", CONTROLLER, ids=lambda path: path.name)
def test_no_module_has_a_number_of_its_own(path: Path) -> None:
    """Constants are ``Tuning``'s, where each has a row in docs/adaptive.md."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            numbers = [
                each.value
                for each in ast.walk(node.value)
                if isinstance(each, ast.Constant) and isinstance(each.value, int | float)
            ]
            assert numbers == [], ast.unparse(node)

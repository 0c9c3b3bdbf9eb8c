"""Which names of another package this one imports, read from its own syntax trees.

pytest tests/unit/test_compat.py
"""

import ast
from collections.abc import Iterable
from pathlib import Path

import vllm_dflash
from vllm_dflash import patches

FOLDERS = tuple(Path(path) for package in (vllm_dflash, patches) for path in package.__path__)
"""Where this package's code lies, in a checkout and in a wheel."""


def imported_names(package: str, folders: Iterable[Path] = FOLDERS) -> dict[str, set[str]]:
    """Dotted names ``module:name`` to the files that import them.

    What may be a module, for its attributes are used (``from vllm import _custom_ops as ops``, then
    ``ops.rms_norm``), stands here with each of them, as ``vllm:_custom_ops.rms_norm``.
    """
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            for name in _names_in(ast.parse(path.read_text(encoding="utf-8")), package):
                found.setdefault(name, set()).add(str(path.relative_to(folder.parent)))
    return dict(sorted(found.items()))


def _names_in(tree: ast.Module, package: str) -> Iterable[str]:
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and _is_below(node.module or "", package)
        ):
            bound |= {
                alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            bound |= {
                alias.asname or alias.name: f"{alias.name}:"
                for alias in node.names
                if _is_below(alias.name, package)
            }
    yield from bound.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := ast.unparse(node.value)) in bound:
            owner = bound[dotted]
            yield f"{owner}{node.attr}" if owner.endswith(":") else f"{owner}.{node.attr}"


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")

"""Finds and fingerprints the source of another package's classes and functions without importing them.

vLLM's modules are heavy and touch the device when imported; their text is not. Limits: a name must be a class or a
function, defined, or bound by ``from x import y``, in a module's body (inside ``if`` and ``try`` too) or a class's.

    pytest tests/unit/test_patching.py
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Fields that some Python versions have and others lack, or that say nothing about what the code does.
_IGNORED_FIELDS = frozenset({"type_params", "type_comment", "type_ignores", "kind"})
_DIGITS = 16


class SourceNotFoundError(LookupError):
    """The module or the name in it does not exist in the installed source."""


@dataclass(frozen=True)
class Definition:
    """Where a dotted name is really defined, once imports are followed."""

    module: str
    qualname: str
    node: _Definition

    @property
    def fingerprint(self) -> str:
        """A sha256 prefix of the code: moved lines, comments and docstrings do not change it."""
        return hashlib.sha256(_canonical(self.node).encode()).hexdigest()[:_DIGITS]

    @property
    def signature(self) -> str:
        """A function's parameters, such as ``self, scheduled, *, registry=``: their names and order, and which have a default."""
        assert not isinstance(self.node, ast.ClassDef)
        arguments = self.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        first_default = len(positional) - len(arguments.defaults)
        names = [a.arg + "=" * (i >= first_default) for i, a in enumerate(positional)]
        if arguments.posonlyargs:
            names.insert(len(arguments.posonlyargs), "/")
        if arguments.vararg:
            names.append(f"*{arguments.vararg.arg}")
        elif arguments.kwonlyargs:
            names.append("*")
        names += [a.arg + "=" * (default is not None) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
        return ", ".join([*names, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])])


@dataclass
class Sources:
    """Reads module sources, each once. Make one for a check and drop it: syntax trees are large."""

    _trees: dict[str, tuple[ast.Module, bool]] = field(default_factory=dict)

    def locate(self, dotted: str) -> Definition:
        """Finds the definition of ``module:Qual.name``.

        Raises:
            SourceNotFoundError: no such module, or no such name in it.
        """
        module, _, qualname = dotted.partition(":")
        tree, is_package = self._parse(module)
        body: Iterable[ast.stmt] = tree.body
        node: ast.stmt | None = None
        for depth, name in enumerate(qualname.split(".")):
            node = _last_binding(body, name)
            if isinstance(node, ast.ImportFrom):
                source = _imported_module(node, module, is_package)
                original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
                rest = qualname.split(".")[depth + 1 :]
                return self.locate(f"{source}:{'.'.join([original, *rest])}")
            if node is None:
                raise SourceNotFoundError(f"{dotted} is not in {module}'s source")
            body = node.body if isinstance(node, ast.ClassDef) else []
        assert isinstance(node, _Definition)
        return Definition(module, qualname, node)

    def has_attribute(self, dotted: str) -> bool:
        """Whether objects of a class have an attribute ``module:Class.name``: the class defines it, or a method assigns it.

        Raises:
            SourceNotFoundError: no such class.
        """
        owner, _, name = dotted.rpartition(".")
        try:
            self.locate(dotted)
        except SourceNotFoundError:
            nodes = ast.walk(self.locate(owner).node)
            return any(isinstance(n, ast.Attribute) and n.attr == name and isinstance(n.ctx, ast.Store) for n in nodes)
        return True

    def _parse(self, module: str) -> tuple[ast.Module, bool]:
        if module not in self._trees:
            spec = _find_spec(module)
            if spec is None or not spec.origin or not spec.origin.endswith(".py"):
                raise SourceNotFoundError(f"module {module} is not installed as Python source")
            with open(spec.origin, encoding="utf-8") as file:
                self._trees[module] = (ast.parse(file.read()), spec.submodule_search_locations is not None)
        return self._trees[module]


def _find_spec(module: str) -> ModuleSpec | None:
    """``importlib.util.find_spec`` would import the parent packages; walking their search paths imports nothing."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module in sys.modules without a spec, such as __main__
        return None
    name = top
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _last_binding(body: Iterable[ast.stmt], name: str) -> _Definition | ast.ImportFrom | None:
    found: _Definition | ast.ImportFrom | None = None
    for statement in _flatten(body):
        if isinstance(statement, _Definition):
            if statement.name == name:
                found = statement
        elif isinstance(statement, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in statement.names):
            found = statement
    return found


def _flatten(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            if "TYPE_CHECKING" not in ast.dump(statement.test):
                yield from _flatten(statement.body)
            yield from _flatten(statement.orelse)
        elif isinstance(statement, ast.Try):
            for part in (statement.body, *(handler.body for handler in statement.handlers), statement.orelse, statement.finalbody):
                yield from _flatten(part)
        else:
            yield statement


def _imported_module(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _canonical(node: object) -> str:
    """``ast.dump`` that says the same on every Python version, without docstrings and empty fields."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        if name not in _IGNORED_FIELDS and value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"

"""Finds and fingerprints the source of another package's classes and functions without importing
them.

vLLM's modules are heavy and touch the device when imported; their text is not. Limits: a name must
be defined, or bound by ``from x import y``, in a module's body (inside ``if`` and ``try`` too) or a
class's.

    pytest tests/unit/test_patching.py tests/unit/test_compat.py
"""

import ast
import hashlib
import importlib.util
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import cast

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Assigned = ast.Assign | ast.AnnAssign | ast.Import
_Bound = _Definition | _Assigned | ast.ImportFrom
# Fields that some Python versions have and others lack, or that say nothing about what the code
# does.
_IGNORED_FIELDS = frozenset({"type_params", "type_comment", "type_ignores", "kind"})
_DIGITS = 16


class SourceNotFoundError(LookupError):
    """The module or the name in it does not exist in the source that was searched."""


@dataclass(frozen=True)
class Definition:
    """Where a dotted name is really defined, once imports are followed."""

    module: str
    qualname: str
    """Empty for a module."""
    node: _Definition | _Assigned | ast.Module
    beside: tuple[ast.AST, ...] = ()
    """What else says which code the name has: other statements that bind it, and the decorators of
    the classes that it is in."""

    @property
    def fingerprint(self) -> str:
        """A sha256 prefix of the code: moved lines, comments and docstrings do not change it."""
        code = [self.node, *self.beside] if self.beside else self.node
        return hashlib.sha256(_canonical(code).encode()).hexdigest()[:_DIGITS]

    @property
    def signature(self) -> str:
        """A function's parameters, such as ``self, scheduled, *, registry=``: their names and
        order, and which have a default."""
        assert isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef)
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
        names += [
            a.arg + "=" * (default is not None)
            for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)
        ]
        return ", ".join([*names, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])])


@dataclass(frozen=True)
class _Source:
    text: str
    tree: ast.Module
    is_package: bool


@dataclass
class Sources:
    """Reads module sources, each once. Make one for a check and drop it: syntax trees are large."""

    root: Path | None = None
    """A folder that packages are searched in before Python's own search path, such as an unpacked
    wheel."""
    asked: set[str] = field(default_factory=set)
    """Modules that were looked for, found or not."""
    _read: dict[str, _Source] = field(default_factory=dict)

    def origin(self, module: str) -> str | None:
        """The file of a module; None where it has none, or is not installed."""
        spec = self._spec(module)
        return None if spec is None else spec.origin

    def locate(self, dotted: str) -> Definition:
        """Finds the definition of ``module:Qual.name``, a class or a function.

        Raises:
            SourceNotFoundError: no such module, or no such class or function in it.
        """
        definition = self.find(dotted)
        if not isinstance(definition.node, _Definition):
            raise SourceNotFoundError(f"{dotted} is neither a class nor a function")
        return definition

    def find(self, dotted: str) -> Definition:
        """Finds what ``from module import name`` gives: also an assigned name or a submodule.

        Raises:
            SourceNotFoundError: no such module, or no such name in it.
        """
        module, _, qualname = dotted.partition(":")
        source = self._source(module)
        body: Iterable[ast.stmt] = source.tree.body
        node: _Bound | None = None
        decorators: list[ast.AST] = []
        for depth, name in enumerate(qualname.split(".")):
            decorators += node.decorator_list if isinstance(node, ast.ClassDef) else []
            node = _last_binding(body, name)
            others = [each for each in _bindings(body, name) if each is not node]
            if isinstance(node, ast.ImportFrom):
                origin = _imported_module(node, module, source.is_package)
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                rest = qualname.split(".")[depth + 1 :]
                if (origin, original) == (module, name):
                    return self._find_elsewhere(module, qualname)
                return self.find(f"{origin}:{'.'.join([original, *rest])}")
            if node is None:
                if depth == 0:
                    return self._find_elsewhere(module, qualname)
                raise SourceNotFoundError(f"{dotted} is not in {module}'s source")
            body = node.body if isinstance(node, ast.ClassDef) else []
        beside = (*decorators, *others)
        return Definition(module, qualname, cast(_Definition | _Assigned, node), beside)

    def has_attribute(self, dotted: str) -> bool:
        """Whether objects of a class have an attribute ``module:Class.name``: the class defines it,
        or a method assigns it.

        Raises:
            SourceNotFoundError: no such class.
        """
        owner, _, name = dotted.rpartition(".")
        try:
            self.find(dotted)
        except SourceNotFoundError:
            nodes = ast.walk(self.locate(owner).node)
            return any(
                isinstance(n, ast.Attribute) and n.attr == name and isinstance(n.ctx, ast.Store)
                for n in nodes
            )
        return True

    def looks_up(self, dotted: str, name: str) -> bool:
        """Whether a function calls ``name`` as one of its module's, or has it for an attribute or a
        key.

        Raises:
            SourceNotFoundError: no such function.
        """
        nodes = list(ast.walk(self.locate(dotted).node))
        is_local = any(
            (isinstance(n, ast.alias) and (n.asname or n.name) == name)
            or (isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store))
            for n in nodes
        )
        return any(
            (isinstance(n, ast.Call) and ast.unparse(n.func) == name and not is_local)
            or (isinstance(n, ast.Attribute) and n.attr == name)
            or (isinstance(n, ast.Constant) and n.value == name)
            for n in nodes
        )

    def text(self, definition: Definition) -> str:
        """The definition as it stands in its file, decorators included."""
        lines = self._source(definition.module).text.splitlines(keepends=True)
        node = definition.node
        if isinstance(node, ast.Module):
            return "".join(lines)
        decorators = node.decorator_list if isinstance(node, _Definition) else []
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        return "".join(lines[first - 1 : node.end_lineno])

    def _find_elsewhere(self, module: str, qualname: str) -> Definition:
        """A name that the module's own text does not bind: of a star import, or a submodule."""
        source = self._source(module)
        for node in _flatten(source.tree.body):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                try:
                    return self.find(
                        f"{_imported_module(node, module, source.is_package)}:{qualname}"
                    )
                except SourceNotFoundError:
                    continue
        name, _, rest = qualname.partition(".")
        submodule = f"{module}.{name}"
        if not source.is_package or self._spec(submodule) is None:
            raise SourceNotFoundError(f"{module}:{qualname} is not in {module}'s source")
        return (
            self.find(f"{submodule}:{rest}")
            if rest
            else Definition(submodule, "", self._source(submodule).tree)
        )

    def _source(self, module: str) -> _Source:
        if module not in self._read:
            spec = self._spec(module)
            if spec is None or not spec.origin or not spec.origin.endswith(".py"):
                raise SourceNotFoundError(f"module {module} is not installed as Python source")
            try:
                with tokenize.open(spec.origin) as file:
                    text = file.read()
                tree = ast.parse(text)
            except (SyntaxError, ValueError) as error:  # of a newer Python, or no text
                raise SourceNotFoundError(
                    f"{module} cannot be read by this Python: {error}"
                ) from None
            self._read[module] = _Source(text, tree, spec.submodule_search_locations is not None)
        return self._read[module]

    def _spec(self, module: str) -> ModuleSpec | None:
        self.asked.add(module)
        return _find_spec(module, self.root)


def _find_spec(module: str, root: Path | None) -> ModuleSpec | None:
    """``importlib.util.find_spec`` would import the parent packages; walking their search paths
    imports nothing."""
    top, *parts = module.split(".")
    try:
        spec = (root and PathFinder.find_spec(top, [str(root)])) or importlib.util.find_spec(top)
    except ValueError:  # a module in sys.modules without a spec, such as __main__
        return None
    name = top
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _last_binding(body: Iterable[ast.stmt], name: str) -> _Bound | None:
    """What binds the name: code before annotations for type checkers, definitions before
    assignments such as a fallback's ``f = None``."""
    for type_checking in (False, True):
        statements = list(_flatten(body, type_checking))
        for kinds in (_Definition | ast.ImportFrom, _Assigned):
            found = [
                statement
                for statement in statements
                if isinstance(statement, kinds) and name in _names(statement)
            ]
            if found:
                return cast(_Bound, found[-1])
    return None


def _bindings(body: Iterable[ast.stmt], name: str) -> list[ast.stmt]:
    """All statements that bind a name, or take it away."""
    return [each for each in _flatten(body) if name in _names(each)]


def _names(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds."""
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            yield statement.name
        case ast.Import() | ast.ImportFrom():
            yield from (alias.asname or alias.name for alias in statement.names)
        case ast.Assign():
            yield from (
                node.id
                for target in statement.targets
                for node in ast.walk(target)
                if isinstance(node, ast.Name)
            )
        case ast.AnnAssign(target=ast.Name()) | ast.AugAssign(target=ast.Name()):
            yield cast(ast.Name, statement.target).id
        case ast.Delete():
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _flatten(body: Iterable[ast.stmt], type_checking: bool = False) -> Iterator[ast.stmt]:
    """A body's statements, those inside ``if``, ``try``, ``with`` and loops too; of ``if
    TYPE_CHECKING`` only where asked for."""
    for statement in body:
        if isinstance(statement, ast.If):
            if type_checking or "TYPE_CHECKING" not in ast.dump(statement.test):
                yield from _flatten(statement.body, type_checking)
            yield from _flatten(statement.orelse, type_checking)
        elif isinstance(statement, ast.Try):
            for part in (
                statement.body,
                *(handler.body for handler in statement.handlers),
                statement.orelse,
                statement.finalbody,
            ):
                yield from _flatten(part, type_checking)
        elif isinstance(statement, ast.With | ast.For | ast.While):
            yield from _flatten(statement.body, type_checking)
            yield from _flatten(getattr(statement, "orelse", ()), type_checking)
        else:
            yield statement


def _imported_module(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _canonical(node: object) -> str:
    """``ast.dump`` that says the same on every Python version, without docstrings and empty
    fields."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if (
            name == "body"
            and isinstance(node, _Definition)
            and ast.get_docstring(node, clean=False) is not None
        ):
            value = value[1:]
        if name not in _IGNORED_FIELDS and value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"

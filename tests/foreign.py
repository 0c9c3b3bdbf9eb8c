"""Finds, in syntax trees, stores into attributes of objects that are not ours.

The rule. A store is ``x.a = ...`` in any form (also ``+=``, ``del``, a loop's or a ``with``'s
target), and ``setattr`` and ``delattr`` in any spelling. So is all that is done with the table of
attributes, ``vars(x)`` or ``x.__dict__``, but read it on the spot; likewise with ``x.__globals__``
and ``sys.modules``. It is allowed where ``x`` is ours, which has to show in the source:

- the first parameter of a method of a class of ours, by whatever name;
- what a class of ours was called for, or a copy that was made on the spot (``copy.copy``,
  ``copy.deepcopy``), but of what has a class's name, which is no copy;
- a name, parameter, attribute or return value that is annotated with a class of ours, by itself or
  as what a container holds;
- a name or an attribute of ``self`` to which nothing but such things and None is assigned, what is
  taken out of one, and what a loop goes over.

All else is not ours, ``Any`` too. There is no list of exceptions. What stores without showing where
is a store into what is not ours: ``setattr`` that is handed on, or called with a ``*`` for its
object, ``exec``, ``eval`` and ``mock.patch``.
"""

import ast
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bindings import Function, is_none, nodes_of_inner, own_nodes, pairs
from store_forms import stores

_COPIES = {"copy.copy", "copy.deepcopy"}
_MADE_HERE = "a copy"
_TAKING = {"get", "setdefault", "pop", "popleft", "values", "items", "append"}
_PASSING = {"list", "tuple", "sorted", "reversed", "iter", "next", "set", "deque", "ModuleList"}


@dataclass
class Class:
    """A class of ours."""

    node: ast.ClassDef
    path: Path
    attributes: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Package:
    """All modules of a package, by path."""

    trees: dict[Path, ast.Module]
    classes: dict[str, Class] = field(default_factory=dict)
    functions: dict[str, str | None] = field(default_factory=dict)
    """Of module level, by ``path:name``, with what they return."""
    names: dict[Path, dict[str, str]] = field(default_factory=dict)
    """What of ours a module's names stand for: ``path:name``. A class of vLLM's may have the name
    of one of ours."""

    def __post_init__(self) -> None:
        for path, tree in self.trees.items():
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            here = self.names[path] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    here[node.name] = f"{module}:{node.name}"
                    self.classes[f"{module}:{node.name}"] = Class(node, path)
            here |= {
                node.name: f"{module}:{node.name}"
                for node in tree.body
                if isinstance(node, ast.FunctionDef)
            }
        roots = tuple({path.parts[0] for path in self.trees})
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.ImportFrom)
                    and (node.module or "").partition(".")[0] in roots
                ):
                    for alias in node.names:
                        self.names[path][alias.asname or alias.name] = f"{node.module}:{alias.name}"
        for path, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    self.functions[self.names[path][node.name]] = self.annotated(node.returns, path)
        for _ in range(3):  # types of attributes build on one another
            for name, known in self.classes.items():
                self._learn(name, known)
        self._unlearn()

    def annotated(
        self, annotation: ast.expr | None, path: Path, inside: str | None = None
    ) -> str | None:
        """The class of ours that an annotation names, by itself or as what a container holds; None
        where it names another beside it, and for a protocol, which anything may have."""
        match annotation:
            case ast.Constant(value=str(text)):
                with suppress(SyntaxError):  # a word of a Literal
                    return self.annotated(ast.parse(text, mode="eval").body, path, inside)
                return None
            case ast.Name(id="Self"):
                return inside
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found = self.names[path].get(name)
                return found if found in self.classes and not self._is_protocol(found) else None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._all_of([left, right], path, inside)
            case ast.Subscript(value=holder, slice=ast.Tuple(elts=parts)):
                kind = getattr(holder, "id", getattr(holder, "attr", ""))
                # Of a table its values, of a function what it returns; of a tuple all of it.
                if kind in ("tuple", "Union"):
                    parts = [part for part in parts if not _is_ellipsis(part)]
                    return self._all_of(parts, path, inside)
                return self.annotated(parts[-1], path, inside)
            case ast.Subscript(slice=part):
                return self.annotated(part, path, inside)
        return None

    def _all_of(self, parts: list[ast.expr], path: Path, inside: str | None) -> str | None:
        found = [self.annotated(part, path, inside) for part in parts if not is_none(part)]
        return found[0] if found and all(found) else None

    def _is_protocol(self, name: str) -> bool:
        return any(
            getattr(base, "id", getattr(base, "attr", "")) == "Protocol"
            for base in self.classes[name].node.bases
        )

    def attribute(self, owner: str | None, name: str) -> str | None:
        """What an attribute of a class of ours is, or a call of its method returns."""
        seen, todo = set(), [owner]
        while todo:
            at = todo.pop()
            current = self.classes.get(at or "")
            if current is None or at in seen:
                continue
            seen.add(at)
            if name in current.attributes:
                return current.attributes[name]
            names = self.names[current.path]
            todo += [
                names.get(getattr(base, "id", getattr(base, "attr", "")))
                for base in current.node.bases
            ]
        return None

    def _unlearn(self) -> None:
        """Attributes that are given something else from outside of their class."""
        for path, tree in self.trees.items():
            module = Scope(self, path, tree, None, None)
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                scope = Scope(self, path, node, module, None)
                for target, value in (pair for n in own_nodes(node) for pair in pairs(n)):
                    if not isinstance(target, ast.Attribute) or is_none(value):
                        continue
                    known = self.classes.get(scope.infer(target.value) or "")
                    if known and target.attr in known.attributes and not scope.infer(value):
                        known.attributes[target.attr] = None

    def _learn(self, owner: str, known: Class) -> None:
        stated: set[str] = set()
        found: dict[str, list[str | None]] = {}

        def state(name: str, annotation: ast.expr | None) -> None:
            known.attributes[name] = self.annotated(annotation, known.path, owner)
            stated.add(name)

        for child in known.node.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                state(child.target.id, child.annotation)
            if not isinstance(child, ast.FunctionDef):
                continue
            if child.returns is not None:
                state(child.name, child.returns)
            scope = Scope(self, known.path, child, None, owner, is_method=True)
            for inner in ast.walk(child):
                if isinstance(inner, ast.AnnAssign) and _is_self(inner.target):
                    state(inner.target.attr, inner.annotation)
                for target, value in pairs(inner):
                    if _is_self(target) and not is_none(value):
                        found.setdefault(target.attr, []).append(scope.infer(value))
        for name in found.keys() - stated:
            known.attributes[name] = found[name][0] if all(found[name]) else None


@dataclass
class Scope:
    """A function's, or a module's, names."""

    package: Package
    path: Path
    node: Function | ast.Module
    outer: "Scope | None"
    owner: str | None
    """The class that it is a method of, or inside a method of."""
    is_method: bool = False
    _busy: set[str] = field(default_factory=set)

    def infer(self, value: ast.expr | None) -> str | None:
        """The class of ours that an expression is of, or holds."""
        package = self.package
        match value:
            case ast.Name(id=name):
                return self.lookup(name)
            case ast.Attribute(value=inner, attr=name):
                return package.attribute(self.infer(inner), name)
            case ast.Subscript(value=inner) | ast.Starred(value=inner) | ast.Await(value=inner):
                return self.infer(inner)
            case ast.NamedExpr(value=inner):
                return self.infer(inner)
            case ast.IfExp(body=one, orelse=other):
                return (
                    self.infer(other)
                    if is_none(one)
                    else self.infer(one)
                    if is_none(other)
                    else self._same([one, other])
                )
            case ast.BoolOp(values=values):
                return self._same(values)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return self._same(elements) if elements else None
            case (
                ast.ListComp(elt=element)
                | ast.GeneratorExp(elt=element)
                | ast.DictComp(value=element)
            ):
                return self.infer(element)
            case ast.Call(func=function, args=arguments):
                return self._called(function, arguments)
        return None

    def _called(self, function: ast.expr, arguments: list[ast.expr]) -> str | None:
        name = getattr(function, "id", getattr(function, "attr", ""))
        if ast.unparse(function) in _COPIES:
            of = arguments[0] if arguments else None
            is_class = isinstance(of, ast.Name | ast.Attribute) and (
                getattr(of, "id", getattr(of, "attr", "")).lstrip("_")[:1].isupper()
            )
            return None if is_class else _MADE_HERE
        if name == "super":
            return self.owner
        called = (
            self.package.names[self.path].get(name, "") if isinstance(function, ast.Name) else ""
        )
        if called in self.package.classes:
            return called
        if called in self.package.functions:
            return self.package.functions[called]
        if name in _PASSING and arguments:
            return self.infer(arguments[0])
        if isinstance(function, ast.Attribute):
            holder = self.infer(function.value)
            if (
                isinstance(function.value, ast.Name)
                and self.package.names[self.path].get(function.value.id) in self.package.classes
            ):
                holder = self.package.names[self.path][function.value.id]
            return holder if name in _TAKING else self.package.attribute(holder, name)
        return None

    def _same(self, values: list[ast.expr]) -> str | None:
        types = [self.infer(value) for value in values]
        return types[0] if all(types) else None

    def lookup(self, name: str) -> str | None:
        """What a name is; None where one of its bindings is not ours."""
        if name in self._busy:
            return None
        self._busy.add(name)
        try:
            bindings = list(self._bindings(name))
        finally:
            self._busy.discard(name)
        if bindings:
            return bindings[0] if all(bindings) else None
        return self.outer.lookup(name) if self.outer is not None else None

    def _bindings(self, name: str) -> Iterator[str | None]:
        if not isinstance(self.node, ast.Module):
            arguments = self.node.args
            for a in [
                *arguments.posonlyargs,
                *arguments.args,
                *arguments.kwonlyargs,
                arguments.vararg,
                arguments.kwarg,
            ]:
                if a is None or a.arg != name:
                    continue
                if a is self._own_object():
                    yield self.owner
                else:
                    yield self.package.annotated(a.annotation, self.path, self.owner)
        for node in [*own_nodes(self.node), *nodes_of_inner(self.node, name)]:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == name
            ):
                yield self.package.annotated(node.annotation, self.path, self.owner)
            for target, value in pairs(node):
                if isinstance(target, ast.Name) and target.id == name and not is_none(value):
                    yield self.infer(value)

    def _own_object(self) -> ast.arg | None:
        """The parameter of a method that is the object, or its class."""
        if not self.is_method or not isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        if any(getattr(d, "id", "") == "staticmethod" for d in self.node.decorator_list):
            return None
        parameters = [*self.node.args.posonlyargs, *self.node.args.args]
        return parameters[0] if parameters and parameters[0].annotation is None else None


def foreign_stores(package: Package) -> Iterator[str]:
    """Each store into an object that is not ours, as ``file:line: source``."""
    for path, tree in package.trees.items():
        yield from _visit(package, path, tree, Scope(package, path, tree, None, None), None)


def _visit(
    package: Package, path: Path, node: ast.AST, scope: Scope, owner: str | None
) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        inner, inside = scope, owner
        if isinstance(child, ast.ClassDef):
            inside = package.names[path][child.name]
        elif isinstance(child, Function):
            inner = Scope(
                package,
                path,
                child,
                scope,
                owner if isinstance(node, ast.ClassDef) else scope.owner,
                is_method=isinstance(node, ast.ClassDef),
            )
        for target in stores(child, node):
            if target is None or inner.infer(target) is None:
                yield f"{path}:{child.lineno}: {ast.unparse(child).splitlines()[0]}"
        yield from _visit(package, path, child, inner, inside)


def _is_self(target: ast.expr) -> bool:
    return (
        isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    )


def _is_ellipsis(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is ...


def read(folder: Path) -> Package:
    """All modules of a folder."""
    return Package(
        {
            path.relative_to(folder.parent): ast.parse(path.read_text())
            for path in sorted(folder.rglob("*.py"))
        }
    )

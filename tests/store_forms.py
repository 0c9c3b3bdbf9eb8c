"""The forms of Python in which an attribute of an object is stored, by one node of a syntax tree.

``foreign.py`` has the rule, and says whose the objects are.
"""

import ast
from collections.abc import Iterator

_SETTERS = {"setattr": 3, "delattr": 2, "__setattr__": 3, "__delattr__": 2}
"""With how many arguments each has, its object the first; a bound method has one less."""
_TABLES = {"__dict__", "__globals__", "f_globals", "__kwdefaults__", "__annotations__"}
"""Attributes that hold what an object, a module or a function has by name."""
_HIDING = {"setattr", "delattr", "vars", "exec", "eval", "builtins", "mock", "patch", "sys"}
"""What must have its own name wherever it is used, for these forms go by names."""
_READING = {"get", "items", "keys", "values", "copy"}
_COPYING = {"dict", "frozenset", "iter", "len", "list", "set", "sorted", "tuple"}


def stores(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr | None]:
    """The objects that a node stores into; None where that does not show."""
    match node:
        case ast.Attribute(value=owner, ctx=ast.Store() | ast.Del()):
            yield owner
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _SETTERS:
            yield _set_by(node, name)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in _SETTERS:
            if not (isinstance(parent, ast.Call) and parent.func is node):
                yield None
        case ast.Call(func=ast.Attribute(attr="__set__" | "__delete__" | "fset"), args=[owner, *_]):
            yield owner
        case ast.Call(func=ast.Name(id="exec" | "eval")):
            yield None
        case ast.Name(id="__builtins__"):
            yield None
        case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="builtins"), *_]):
            yield None
        case ast.Name(id="exec" | "eval" | "vars", ctx=ast.Load()) if not (
            isinstance(parent, ast.Call) and parent.func is node
        ):
            yield None
        case ast.Import(names=names) | ast.ImportFrom(names=names) if any(
            n.asname and n.name.rpartition(".")[2] in _HIDING for n in names
        ):
            yield None
        case ast.Attribute(attr="sys"):  # importlib.sys.modules
            yield None
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="builtins"), attr="exec" | "eval")
            | ast.Attribute(
                value=ast.Name(id="patch") | ast.Attribute(attr="patch"),
                attr="object" | "dict" | "multiple",
            )
            | ast.Attribute(value=ast.Name(id="mock") | ast.Attribute(attr="mock"), attr="patch")
        ):
            yield None
        case ast.ImportFrom(module="unittest.mock" | "mock"):
            yield None
        case ast.ImportFrom(module="sys", names=names) if any(
            n.name in ("modules", "*") for n in names
        ):
            yield None
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]) if (
            name in _SETTERS
        ):
            yield None
        case ast.expr() if not _reads(parent, node):
            yield from _dict_of(node)


def _set_by(call: ast.Call, name: str) -> ast.expr | None:
    """The object of a call of one of ``_SETTERS``."""
    if isinstance(call.func, ast.Attribute) and name.startswith("__"):
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return None
        if len(call.args) < _SETTERS[name]:
            return call.func.value
    return None if not call.args or isinstance(call.args[0], ast.Starred) else call.args[0]


def _dict_of(table: ast.expr) -> Iterator[ast.expr]:
    """The object whose attributes a table holds."""
    match table:
        case (
            ast.Call(func=ast.Name(id="vars"), args=[owner])
            | ast.Attribute(value=ast.Name(id="sys") as owner, attr="modules", ctx=ast.Load())
            | ast.Call(
                func=ast.Name(id="getattr"),
                args=[owner, ast.Constant(value="__dict__" | "__globals__"), *_],
            )
        ):
            yield owner
        case ast.Attribute(value=owner, attr=name, ctx=ast.Load()) if name in _TABLES:
            yield owner


def _reads(parent: ast.AST, table: ast.expr) -> bool:
    """Whether what is around a table only reads it, or copies it."""
    match parent:
        case ast.Subscript(ctx=ast.Load()):
            return parent.value is table
        case ast.Attribute(attr=name):
            return name in _READING
        case ast.Call(func=ast.Name(id=name)):
            return name in _COPYING
        case ast.For(iter=over) | ast.comprehension(iter=over):
            return over is table
        case ast.Dict(keys=keys, values=values):  # {**table}
            return any(key is None and value is table for key, value in zip(keys, values))
        case ast.keyword(arg=None) | ast.Compare() | ast.BinOp():
            return True
    return False

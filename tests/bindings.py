"""What a syntax tree binds to names and attributes, and with what; for ``foreign.py``."""

import ast
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Without those of functions and classes inside."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*Function.__args__, ast.ClassDef)):
            yield child
            yield from own_nodes(child)


def nodes_of_inner(node: ast.AST, name: str) -> Iterator[ast.AST]:
    """Of functions inside that bind a name of this one."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child is not node:
            own = list(own_nodes(child))
            if any(isinstance(n, ast.Nonlocal | ast.Global) and name in n.names for n in own):
                yield from own


def pairs(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Targets of bindings with what is bound; None where that does not show."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _unpack(target, value)
        case ast.AugAssign(target=target) | ast.NamedExpr(target=target, value=None):
            yield target, None
        case ast.NamedExpr(target=target, value=value):
            yield target, value
        case (
            ast.For(target=target, iter=over)
            | ast.AsyncFor(target=target, iter=over)
            | ast.comprehension(target=target, iter=over)
        ):
            yield from _loop(target, over)
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield ast.Name(name), None
        case ast.MatchMapping(rest=str(name)):
            yield ast.Name(name), None
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            for alias in names:
                yield ast.Name(alias.asname or alias.name.partition(".")[0]), None
        case ast.withitem(context_expr=value, optional_vars=target) if target is not None:
            yield from _unpack(target, value)
        case ast.ExceptHandler(name=str(name)):
            yield ast.Name(name), None


def _loop(target: ast.expr, over: ast.expr) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(target, ast.Tuple) and isinstance(over, ast.Call):
        name = getattr(over.func, "id", getattr(over.func, "attr", ""))
        sources: list[ast.expr | None] = [None] * len(target.elts)
        if name == "zip" and len(over.args) == len(target.elts):
            sources = list(over.args)
        elif name == "enumerate":
            sources = [None, over.args[0]]
        elif name == "items" and isinstance(over.func, ast.Attribute):
            sources = [None, over.func.value]
        for element, source in zip(target.elts, sources, strict=True):
            yield from _unpack(element, source)
    else:
        yield from _unpack(target, over)


def _unpack(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if not isinstance(target, ast.Tuple | ast.List):
        yield target, value
        return
    is_pairwise = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
    for i, element in enumerate(target.elts):
        yield from _unpack(element, value.elts[i] if is_pairwise else None)


def is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None

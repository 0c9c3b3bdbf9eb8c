"""What keeps a kind of drafter from being taken: parts that are not there, and names that are
another's, by which a drafter or a target of that other would be taken for one of this kind.

    pytest tests/unit/test_kind_checks.py
"""

import ast
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from vllm_dflash.upstream import SourceNotFoundError, Sources

if TYPE_CHECKING:
    from vllm_dflash.kinds import Kind

PARTS = ("Reference", "Served")
"""The classes of a context's and of a head's modules."""


def namesake(kind: "Kind", others: Iterable["Kind"]) -> str | None:
    """A name by which this kind would be found in another's place, and whose it is, such as ``X of
    dflash``. What a kind is also named yields to one that is named so."""
    names = {kind.architecture, kind.served_architecture}
    for other in others:
        if kind.name == other.name:
            return f"{kind.name} of another kind"
        if taken := names & {other.architecture, other.served_architecture}:
            return f"{min(taken)} of {other.name}"
        head, theirs = kind.head, other.head
        if head.name and head.name == theirs.name and head.modules != theirs.modules:
            return f"{head.name} of the head of {other.name}"
    return None


def namesake_in_vllm(kind: "Kind") -> str | None:
    """The same for what the installed vLLM has, by its source: models, and readers of speculators'
    format."""
    sources = Sources()
    with suppress(SourceNotFoundError):
        registry = sources.find("vllm.model_executor.models:registry").node
        models = {
            key.value
            for table in ast.walk(registry)
            if isinstance(table, ast.Dict)
            for key in table.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        names = {kind.served_architecture, *([] if kind.served_as else [kind.architecture])}
        if taken := models & names:
            return f"{min(taken)} of a model of vLLM's"
    with suppress(SourceNotFoundError):
        readers = sources.find("vllm.transformers_utils.configs.speculators:algos").node
        own = f"register_speculator({kind.name!r})"
        if any(ast.unparse(n) == own for n in ast.walk(readers) if isinstance(n, ast.Call)):
            return f"{kind.name} of a kind that vLLM reads in speculators' format itself"
    return None


def missing_parts(kind: "Kind") -> list[str]:
    """The parts that a record names and that do not exist, a sentence each.

    The modules are read as text, for they take torch and vLLM. One is imported only where its text
    does not bind a part.
    """
    sources = Sources()
    if kind.context.modules == kind.head.modules:
        return [
            f"its context and its head are both in {kind.context.modules}, where a part such as"
            f" {PARTS[0]} can be of one of them: each needs a module of its own"
        ]
    return [
        problem
        for record in (kind.context, kind.head)
        for part in PARTS
        if (problem := _missing_part(sources, type(record).__name__.lower(), record.modules, part))
    ]


def _missing_part(sources: Sources, axis: str, module: str, part: str) -> str | None:
    with suppress(SourceNotFoundError):
        sources.find(f"{module}:{part}")
        return None
    try:
        is_there = hasattr(import_module(module), part)
    except (Exception, SystemExit) as error:  # whatever another package's import ends in
        return f"its {axis}'s {part} cannot be imported from {module} ({error!r})"
    return None if is_there else f"its {axis} has no {part} in {module}"

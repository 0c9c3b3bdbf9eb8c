"""Which of another package's definitions were replaced in this process, so that its source does not
say what runs. Imports nothing of it.

Limits: a definition is a function, a method or a class with its own methods. Code counts as another
package's by the module whose globals it runs with, which ``functools.wraps`` does not copy.

    pytest tests/unit/test_replaced.py tests/engine/test_edited_vllm.py
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

_OWN = __name__.partition(".")[0]
# Decorators are of these; a mock is another's.
_TRUSTED = (sys.stdlib_module_names | {"torch", _OWN}) - {"unittest"}


def replaced_by(dotted: str) -> str | None:
    """What stands in the place of ``module:Qual.name``, or in that of a method of it, that is
    neither its package's, ours, nor a decorator of Python's or torch's; None where nothing does, or
    the module is not imported."""
    module, _, qualname = dotted.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = inspect.getattr_static(found, part, None)
    trusted = _TRUSTED | {module.partition(".")[0]}
    members = vars(found).values() if isinstance(found, type) else ()
    for value in (found, *members):
        for layer in _layers(value):
            if _home(layer).partition(".")[0] not in trusted:
                return f"{_home(layer)}:{getattr(layer, '__qualname__', type(layer).__qualname__)}"
    return None


def name_of(value: Any) -> tuple[str, str]:
    """The module and the name that a definition says it has: a wrapper says those of what it
    wraps."""
    value = getattr(value, "fget", None) or value
    return getattr(value, "__module__", "?"), getattr(value, "__qualname__", repr(value))


def _layers(value: Any) -> Iterator[Any]:
    """A definition's classes and functions from the outermost inwards, as decorators wrap them."""
    if isinstance(value, property):
        for part in filter(None, (value.fget, value.fset, value.fdel)):
            yield from _layers(part)
    elif isinstance(value, staticmethod | classmethod):
        yield from _layers(value.__func__)
    elif isinstance(value, functools.cached_property | functools.partial):
        yield from _layers(value.func)
    elif isinstance(value, Callable):  # type: ignore[arg-type]
        yield value
        if not isinstance(value, type) and hasattr(value, "__wrapped__"):
            yield from _layers(value.__wrapped__)


def _home(value: Any) -> str:
    """The module that a function's code runs in, or that a class is of; of any other object its
    class's."""
    if inspect.isfunction(value):
        return str(value.__globals__.get("__name__", "?"))
    return str((value if isinstance(value, type) else type(value)).__module__)

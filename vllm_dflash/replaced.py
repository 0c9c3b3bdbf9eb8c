"""Which of another package's definitions were replaced in this process, so that its source does not
say what runs. Imports nothing of it.

Limits: a definition is a function, a method or a class with its own methods. Code counts as another
package's by the module whose globals it runs with, which ``functools.wraps`` does not copy.

    pytest tests/unit/test_replaced.py tests/engine/test_other_plug_ins.py
"""

import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

_OWN = __name__.partition(".")[0]
_TRUSTED = sys.stdlib_module_names | {"torch", _OWN}
"""Decorators are of these."""
_UNTRUSTED = {"unittest"}
"""A mock is another's."""
_HOLDERS = functools.cached_property | functools.partial | functools.partialmethod
_METHODS = types.FunctionType | staticmethod | classmethod | property | functools.partialmethod


def replaced_by(dotted: str) -> str | None:
    """What stands in the place of ``module:Qual.name``, or in that of a method of it, that is
    neither its package's, ours, nor a decorator of Python's or torch's; None where nothing does, or
    the module is not imported."""
    module, _, qualname = dotted.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = inspect.getattr_static(found, part, None)
    package = module.partition(".")[0]
    members = vars(found).values() if isinstance(found, type) else ()
    for value in (found, *members):
        layers = list(_layers(value))
        # A decorator of another's may be around a function, and not in its place.
        own = {package, _OWN} if value is found else {package, _OWN, *sys.stdlib_module_names}
        for layer, trusted in zip(reversed(layers), (own, *[_TRUSTED | own] * len(layers))):
            if _root(layer) not in trusted - _UNTRUSTED:
                return described(layer)
    return None


def shadowed(owner: Any) -> str | None:
    """The name of a method of an object's class in whose place the object has something of its own;
    None where there is none."""
    for name in vars(owner):
        if isinstance(inspect.getattr_static(type(owner), name, None), _METHODS):
            return str(name)
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
    elif isinstance(value, _HOLDERS):
        yield from _layers(value.func)
    elif callable(value) or hasattr(type(value), "__get__"):
        yield value
        if not isinstance(value, type) and hasattr(value, "__wrapped__"):
            yield from _layers(value.__wrapped__)


def _root(value: Any) -> str:
    return _home(value).partition(".")[0]


def described(value: Any) -> str:
    """Where a definition's code is from, and its name, which a wrapper has of what it wraps."""
    return f"{_home(value)}:{getattr(value, '__qualname__', type(value).__qualname__)}"


def _home(value: Any) -> str:
    """The module that a function's code runs in, or that a class is of; of any other object its
    class's."""
    if inspect.ismethod(value):
        value = value.__func__
    if inspect.isfunction(value):
        return str(value.__globals__.get("__name__", "?"))
    return str((value if isinstance(value, type) else type(value)).__module__)

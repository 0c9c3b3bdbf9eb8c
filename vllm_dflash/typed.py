"""Whether the fields of a record hold what they are declared to: one that another package wrote is
judged where it is made, not where it is first used.

pytest tests/unit/test_kind_checks.py
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin


def check_fields(record: Any) -> None:
    """Of a dataclass's instance; types that are written as text are not looked at.

    Raises:
        TypeError: names each field that holds something else, and what it has to be.
    """
    problems = [
        f"{field.name} is {getattr(record, field.name)!r}, and has to be {_said(field.type)}"
        for field in fields(record)
        if not _fits(getattr(record, field.name), field.type)
    ]
    if problems:
        raise TypeError(f"{type(record).__name__}: {'; '.join(problems)}")


def _fits(value: Any, wanted: Any) -> bool:
    origin, parts = get_origin(wanted), get_args(wanted)
    if wanted is object or isinstance(wanted, str):
        return True
    if wanted is None or wanted is type(None):
        return value is None
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is Callable:
        return callable(value) and _takes(value, len(parts[0]))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(each) == len(value) and all(map(_fits, value, each))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def _takes(function: Callable[..., Any], number: int) -> bool:
    """Whether it can be called with so many arguments, as far as it can be told."""
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    except ValueError:  # of a builtin
        return True
    return True


def _said(wanted: Any) -> str:
    if get_origin(wanted) is Callable:
        number = len(get_args(wanted)[0])
        return f"a function of {number} argument{'s' * (number != 1)}"
    return inspect.formatannotation(wanted)

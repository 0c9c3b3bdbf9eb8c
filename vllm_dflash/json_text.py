"""Reads JSON that a user or another program wrote: each key once, and no deeper than anything here
has to be.

Python's own reader takes the last of two values of a key without a word, and gives up on depth
wherever its stack happens to end. Pure: no part of this package is imported.

    pytest tests/unit/test_json_text.py
"""

import json
from collections import Counter
from typing import Any

MOST_LEVELS = 200
"""Of lists and objects in each other; far below the depth that Python's readers and writers reach,
and far above what a file that is meant has."""


class RepeatedKeyError(ValueError):
    """An object gives a key twice; ``key`` is its name, ``value`` the whole as Python's own reader
    takes it."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.value = key, value
        super().__init__(f"it gives the key {json.dumps(key[:200])} twice")


def loads(text: str | bytes) -> Any:
    """The value that ``text`` holds; bytes in whichever UTF they are.

    Raises:
        ValueError: it is no JSON, an object gives a key twice (``RepeatedKeyError``), or it is
            deeper than ``MOST_LEVELS``.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    repeated: list[str] = []

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return found

    try:
        value = json.loads(text, object_pairs_hook=each_once)
    except RecursionError:
        raise _too_deep() from None
    if repeated:
        raise RepeatedKeyError(repeated[0], value)
    # Most texts have fewer brackets than that, and need no second look.
    if text.count("[") + text.count("{") > MOST_LEVELS and _is_deep(value):
        raise _too_deep()
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than ``MOST_LEVELS`` deep; level by level,
    without recursion."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            each
            for outer in level
            if isinstance(outer, list | dict)
            for each in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(each, list | dict)
        ]
        if not level:
            return False
    return True


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MOST_LEVELS} levels deep")

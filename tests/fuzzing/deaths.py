"""Why vLLM's own engine ends. Pure: ``lives`` runs the engine without a drafter."""

from collections.abc import Callable
from typing import Any

from fuzzing.draw import ORDINARY, without

Requests = list[dict[str, Any]]
Lives = Callable[[dict[str, Any], Requests], bool]
SIMPLEST: Requests = [
    {"id": 0, "prompt": [2], "params": {"temperature": 0.0, "max_tokens": 2}, "arrives": 0}
]
_NEEDED = ("id", "prompt", "params", "arrives", "temperature", "max_tokens")


def cause(common: dict[str, Any], requests: Requests, lives: Lives) -> str | None:
    """The field without which the engine without a drafter goes on: of the settings ``common``
    where the simplest request ends it, else of ``requests``. None where it is no single one, or
    where a new engine goes on."""
    if not lives(common, SIMPLEST):
        for name, value in common.items():
            if value != ORDINARY[name] and lives(common | {name: ORDINARY[name]}, SIMPLEST):
                return name
        return None
    if lives(common, requests):  # it takes what the engine was asked before
        return None
    fields = {name for r in requests for name in (*r, *r["params"])}
    for name in sorted(fields.difference(_NEEDED)):
        if lives(common, without(requests, [name])):
            return name
    return None

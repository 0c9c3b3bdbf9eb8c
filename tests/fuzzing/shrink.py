"""From a round in which a request's answer differs to the least that still differs. Pure:
``differs`` runs the engines."""

from collections.abc import Callable
from typing import Any

Requests = list[dict[str, Any]]
MOST_TRIES = 40


def shrink(requests: Requests, wanted: int, differs: Callable[[Requests, int], bool]) -> Requests:
    """The fewest requests found, with the fewest parameters, in which that of id ``wanted`` still
    differs; all where it does not again."""
    left = MOST_TRIES

    def still(tried: Requests) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and differs(tried, wanted)

    mine = next(r for r in requests if r["id"] == wanted)
    if still([mine | {"arrives": 0}]):
        requests = [mine | {"arrives": 0}]
    elif still(requests):
        requests = _fewer_neighbours(requests, wanted, still)
    else:
        return requests
    return _simpler(requests, wanted, still)


def _fewer_neighbours(
    requests: Requests, wanted: int, still: Callable[[Requests], bool]
) -> Requests:
    """Leaves out ever smaller parts of the neighbours."""
    part = len(requests) // 2
    while part:
        at = 0
        while at < len(requests):
            tried = [
                r for i, r in enumerate(requests) if r["id"] == wanted or not at <= i < at + part
            ]
            if len(tried) < len(requests) and still(tried):
                requests = tried
            else:
                at += part
        part //= 2
    return requests


def _simpler(requests: Requests, wanted: int, still: Callable[[Requests], bool]) -> Requests:
    """Leaves out fields, then halves of the prompts and of the neighbours' outputs."""

    def replaced(old: dict[str, Any], new: dict[str, Any]) -> Requests:
        return [new if r is old else r for r in requests]

    for request_id in [r["id"] for r in requests]:
        for name in [*requests[0].keys(), *_fields(requests)]:
            current = next(r for r in requests if r["id"] == request_id)
            if name in current and name not in (
                "id",
                "prompt",
                "params",
                "arrives",
                "text",
                "truncate_prompt_tokens",
            ):
                new = {k: v for k, v in current.items() if k != name}
            elif name in current["params"] and name not in ("temperature", "max_tokens"):
                new = current | {
                    "params": {k: v for k, v in current["params"].items() if k != name}
                }
            else:
                continue
            if still(replaced(current, new)):
                requests = replaced(current, new)
        current = next(r for r in requests if r["id"] == request_id)
        while "text" not in current and len(current["prompt"]) > 1:
            new = current | {"prompt": current["prompt"][len(current["prompt"]) // 2 :]}
            if not still(replaced(current, new)):
                break
            requests, current = replaced(current, new), new
    return requests


def _fields(requests: Requests) -> list[str]:
    return sorted({name for r in requests for name in r["params"]})

"""The user's own function, through which each line that a server records goes before it is written.

    def hide(line: dict) -> dict | None: ...

It is given a line as ``vllm-dflash train`` reads it, a dict with ``prompt``, ``messages`` or
``prompt_token_ids``, ``response`` and ``finish_reason``, and returns one in its place, or None for
none. Where it fails the line is not written, and what it raised is named by its type alone: the
message may hold the user's text. It runs in the recorder's thread, so a slow one delays
no client, and drops lines.

    pytest tests/unit/test_follow_recorder.py
"""

import importlib
import json
from collections.abc import Callable
from typing import Any

from vllm_dflash.json_text import loads
from vllm_dflash.training.errors import TrainingError

Redact = Callable[[dict[str, Any]], Any]


class NoLineError(TypeError):
    """The function returned neither a line nor None; the message has no text of the line."""


def load(name: str | None) -> Redact | None:
    """The function MODULE:FUNCTION; None for no name.

    Raises:
        TrainingError: there is none.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"VLLM_DFLASH_RECORD_REDACT is {name!r}, which is not there ({error}): give"
            " MODULE:FUNCTION of something that the server can import"
        ) from None
    if not callable(found):
        raise TrainingError(f"VLLM_DFLASH_RECORD_REDACT is {name!r}, which is no function")
    redact: Redact = found
    return redact


def apply(redact: Redact, line: str) -> str | None:
    """A line as the function leaves it; None where it is to be left out.

    Raises:
        NoLineError: it returned neither a dict of plain values nor None; or whatever it raises.
    """
    found = redact(loads(line))
    if found is None:
        return None
    if not isinstance(found, dict):
        raise NoLineError(f"it returned a {type(found).__name__}, not a dict or None")
    try:
        return json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise NoLineError("it returned a dict with values that are none of JSON's") from None

"""The one question before anything of ours runs around vLLM's own functions: is the engine's
drafter ours? Where it is not, nothing else of vLLM's objects is read.

pytest tests/patches/test_guard.py
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.supported import SUPPORTED_VLLM

VLLM_CONFIG = "vllm_config.speculative_config"
"""Where most of vLLM's objects have their ``SpeculativeConfig``."""


def drafts_ours(owner: Any, place: str = VLLM_CONFIG) -> bool:
    """Whether the ``SpeculativeConfig``, or None, that ``owner`` has at ``place`` is for a drafter
    of ours; an empty place: it is the owner itself."""
    return is_ours(attrgetter(place)(owner) if place else owner)


def part_of_ours(module: str, name: str) -> Any:
    """What stands in the place of a part of vLLM's, imported once a drafter of ours needs it.

    Raises:
        RuntimeError: it cannot be imported beside this vLLM; names the remedy.
    """
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise RuntimeError(
            f"vllm-dflash does not fit this vLLM ({type(error).__name__}: {error}): install a"
            f" supported one ({SUPPORTED_VLLM}), serve without the drafter, or set VLLM_DFLASH=0"
            " to serve it with vLLM's own dflash"
        ) from error


def instead(ours: Callable[..., Any], place: str = VLLM_CONFIG) -> Callable[[Any], Any]:
    """A record's ``replace``: where the first argument drafts ours, ``ours(original, *arguments)``
    runs in the original's place. Of a property it replaces what reads it."""

    def replace(original: Any) -> Any:
        function: Any = original.fget if isinstance(original, property) else original

        @wraps(function)
        def guarded(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if drafts_ours(owner, place):
                return ours(function, owner, *args, **kwargs)
            return function(owner, *args, **kwargs)

        return property(guarded) if isinstance(original, property) else guarded

    return replace


def afterwards(then: Callable[[Any], None], place: str = VLLM_CONFIG) -> Callable[[Any], Any]:
    """A record's ``replace``: the original runs, and then, where its first argument drafts ours,
    ``then`` of that. It is asked late, as a constructor makes what says so."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def guarded(owner: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(owner, *args, **kwargs)
            if drafts_ours(owner, place):
                then(owner)
            return result

        return guarded

    return replace

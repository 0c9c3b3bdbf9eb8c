"""The environment variables of this package are known to vLLM, which warns of each that begins
with VLLM_ and is none of its own, and ends the start where it is told to be strict.

    pytest tests/patches/test_environment.py
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import Patch

NAMES = (
    "VLLM_DFLASH",
    "VLLM_DFLASH_CPU_FIXES",
    "VLLM_DFLASH_RECORD",
    "VLLM_DFLASH_RECORD_MAX_DAYS",
    "VLLM_DFLASH_RECORD_MAX_MB",
    "VLLM_DFLASH_RECORD_REDACT",
    "VLLM_DFLASH_SWAP_FROM",
)
"""What users set. One that is misspelt stays unknown."""


def _replace(original: Any) -> Any:
    check: Callable[[Any, bool], None] = original.__func__

    @wraps(check)
    def validate_environ(cls: Any, hard_fail: bool) -> None:
        """In vLLM's table for this one look only: what is in it counts for compiled graphs too."""
        from vllm import envs

        known = envs.environment_variables
        added = [name for name in NAMES if name not in known]
        known.update(dict.fromkeys(added, lambda: None))
        try:
            check(cls, hard_fail)
        finally:
            for name in added:
                del known[name]

    return classmethod(validate_environ)


_TARGET = "vllm.platforms.interface:Platform.validate_environ"
PATCH = Patch(
    target=_TARGET,
    needs="optional",
    signatures={_TARGET: "cls, hard_fail"},
    looked_up={_TARGET: ("environment_variables",)},
    names=("vllm.envs:environment_variables",),
    why=(
        "vLLM calls the variables of a plug-in unknown, once for each at every start, as it would a"
        " misspelt one of its own, and refuses to start with them under"
        " fail_on_environ_validation. Its table of names is no registry: each in it is part of the"
        " key of compiled graphs"
    ),
    until="a plug-in can name its environment variables",
    replace=_replace,
)

"""The plug-in: vLLM calls ``register`` in each of its processes, through the entry point
``vllm.general_plugins``.

Three hops to the work: this entry point, its gate (``VLLM_DFLASH``, the supported range, the source
check), and the
list ``vllm_dflash.patches.ALL``. Nothing heavy is imported: models by string, patches when their
modules come.

    pytest tests/patches/test_upstream.py
"""

import functools
import importlib.metadata
import os
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.examined import cache_folder
from vllm_dflash.log import logger
from vllm_dflash.metrics.snapshots import choose_folder
from vllm_dflash.patch import PatchError, is_switched_off
from vllm_dflash.patching import PatchSet
from vllm_dflash.supported import PROBLEM, installed_vllm, is_supported, refusal

SWITCH = "VLLM_DFLASH"
_NAME = "dflash"


def register() -> None:
    """Registers the drafter's model and applies the patches; does nothing where it is switched off
    or was done before.

    On a vLLM that it was not written for it warns once, leaves vLLM as it is, and registers a
    refusal for our architecture alone.
    """
    if is_off():
        return
    from vllm import ModelRegistry

    version = installed_vllm()
    problem = None if is_supported(version) else refusal(version)
    if problem is None:
        try:
            patch_set().apply(version)
            _register_speculators()
        except PatchError as error:
            problem = str(error)
        except Exception as error:  # plain serving goes on whatever is wrong with us
            problem = f"it could not be set up: {type(error).__name__}: {error}"
            patch_set().revert()
    if problem is None:
        for name in kinds.registered_architectures():
            ModelRegistry.register_model(name, "vllm_dflash.models.drafter:DrafterForCausalLM")
        from vllm_dflash.profiles import leave_threads  # needs NumPy, which comes with vLLM

        choose_folder()
        leave_threads()
        return
    _refuse(problem)


def _refuse(problem: str) -> None:
    """Lets vLLM refuse our architectures, and says once why; also where a module that came late
    showed it."""
    from vllm import ModelRegistry

    # Inherited by the processes that vLLM starts: a user reads the warning once, and the refusal
    # names its cause.
    if PROBLEM not in os.environ:
        os.environ[PROBLEM] = problem
        logger.warning("%s. Serving without a DFlash drafter is not affected", problem)
    try:
        names = kinds.registered_architectures()
    except Exception:  # that is then the problem
        names = ()
    for name in names:
        ModelRegistry.register_model(name, "vllm_dflash.models.unsupported:UnsupportedVLLM")


def _register_speculators() -> None:
    """Teaches vLLM to read the speculators format of kinds that it does not know, through its own
    registry of such types."""
    from vllm.transformers_utils.configs.speculators.algos import (
        SUPPORTED_SPECULATORS_TYPES,
        register_speculator,
        update_dflash,
    )

    def register(kind: kinds.Kind) -> None:
        @register_speculator(kind.name)
        def update(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
            update_dflash(config_dict, pre_trained_config)
            pre_trained_config["architectures"] = [kind.served_architecture]

    for kind in kinds.every().values():
        if kind.name not in SUPPORTED_SPECULATORS_TYPES:
            register(kind)


def is_off() -> bool:
    """Whether the user has switched the plug-in off: ``VLLM_DFLASH=0``."""
    return is_switched_off(SWITCH)


def why_off() -> str | None:
    """Why vLLM would run without the plug-in; None where it would not."""
    if is_off():
        return f"off: {SWITCH}={os.environ[SWITCH]}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _NAME not in allowed.split(","):
        return f"off: VLLM_PLUGINS={allowed!r} does not name {_NAME}"
    if not any(
        point.name == _NAME
        for point in importlib.metadata.entry_points(group="vllm.general_plugins")
    ):
        return "off: vLLM cannot see it; install this package with pip into vLLM's environment"
    return None


@functools.cache
def patch_set() -> PatchSet:
    """This process's one set of patches."""
    from vllm_dflash.patches import ALL

    return PatchSet(ALL, _refuse, cache=cache_folder())

"""What was measured of an engine's steps: where that is kept, and what of it is there.

pytest tests/engine/test_adaptive.py
"""

from pathlib import Path
from typing import Any

from vllm import envs
from vllm.platforms import current_platform

from vllm_dflash.adaptive.settings import is_adaptive, wants_adaptive
from vllm_dflash.cost_profile import GUESS, Profile
from vllm_dflash.log import logger
from vllm_dflash.profiles import find, key_of, this_cpu
from vllm_dflash.supported import installed_vllm


def profile_for(vllm_config: Any) -> Profile:
    """What was measured of an engine's steps, here or at another start; else a guess."""
    try:
        return find(*profile_key(vllm_config)) or GUESS
    except Exception:  # what chooses must not end what serves
        logger.exception("what steps cost is not known: a guess stands for it")
        return GUESS


def adapts(vllm_config: Any) -> bool:
    """Whether the controller of an engine with our scheduler plans its steps. By a guess, under
    asynchronous scheduling, only where the user asks for it: it may be slower than plain decoding,
    and than whole drafts (docs/performance.md)."""
    if not is_adaptive(vllm_config):
        return False
    return (
        not vllm_config.scheduler_config.async_scheduling
        or bool(wants_adaptive(vllm_config.additional_config))
        or profile_for(vllm_config) is not GUESS
    )


def profile_key(vllm_config: Any) -> tuple[Path, str]:
    """vLLM's cache folder, and the name of an engine's profile in it."""
    device = vllm_config.device_config.device_type
    name = this_cpu() if device == "cpu" else str(current_platform.get_device_name())
    return Path(envs.VLLM_CACHE_ROOT), key_of(vllm_config, installed_vllm() or "", name)

"""Whether an engine drafts adaptively: as ``additional_config={"dflash": {"adaptive": true}}``
says; else where nothing stands in the way.

pytest tests/unit/test_settings.py
"""

from functools import cache
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.log import logger

SECTION = "dflash"
_ADAPTIVE = "adaptive"
_EXAMPLE = f'{{"{SECTION}": {{"{_ADAPTIVE}": false}}}}'
_SCHEDULER = "vllm_dflash.adaptive.scheduler.AdaptiveScheduler"
_ASYNC_SCHEDULER = "vllm_dflash.adaptive.scheduler.AdaptiveAsyncScheduler"


class SettingsError(ValueError):
    """A setting that does not exist or has no such value; the message names it and the remedy."""


def wants_adaptive(additional_config: Any) -> bool | None:
    """What the user says, or None for nothing.

    Raises:
        SettingsError: on anything in our section that is not known, and on what looks as if it
            should have been our section.
    """
    given = additional_config if isinstance(additional_config, dict) else {}
    for key in given:
        if key == _ADAPTIVE or (key != SECTION and _letters(key) in (SECTION, f"vllm{SECTION}")):
            raise SettingsError(
                f"additional_config: {key} is no key of ours, and says nothing: give {_EXAMPLE}"
            )
    section = given.get(SECTION)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise SettingsError(
            f"additional_config: {SECTION} is {section!r}: give an object such as {_EXAMPLE}"
        )
    unknown = sorted(section.keys() - {_ADAPTIVE})
    if unknown:
        raise SettingsError(
            f"additional_config: {SECTION}.{unknown[0]} is no setting: there is {_ADAPTIVE} (true"
            " or false)"
        )
    value = section.get(_ADAPTIVE)
    if value is not None and not isinstance(value, bool):
        raise SettingsError(
            f"additional_config: {SECTION}.{_ADAPTIVE} is {value!r}: give true or false"
        )
    return value


def _letters(key: Any) -> str:
    """Of a key, however it is written."""
    return "".join(filter(str.isalpha, str(key).casefold()))


def scheduler_for(vllm_config: Any) -> str | None:
    """Our scheduler's name for a vLLM ``VllmConfig`` where drafting is to be adaptive and it is not
    there yet; else None. What stands in the way of one that nobody asks for, the log says.

    Raises:
        SettingsError: the user asks for it where it cannot be, or for a setting that does not
            exist.
    """
    speculative = vllm_config.speculative_config
    if not is_ours(speculative):
        return None
    wanted = wants_adaptive(vllm_config.additional_config)
    if wanted is False or is_adaptive(vllm_config):
        return None
    scheduler, obstacle = vllm_config.scheduler_config, _obstacle(vllm_config)
    if obstacle and wanted is None:
        _say(f"drafting is not adaptive: {obstacle}")
        return None
    if obstacle:
        raise SettingsError(f"additional_config: {SECTION}.{_ADAPTIVE} is true, but {obstacle}")
    return _ASYNC_SCHEDULER if scheduler.async_scheduling else _SCHEDULER


@cache
def _say(line: str) -> None:
    """Once in a process: vLLM makes its configuration more than once."""
    logger.info("%s", line)


def is_adaptive(vllm_config: Any) -> bool:
    """Whether the engine of a ``VllmConfig`` has our scheduler."""
    # Where vLLM has no such setting, the record of our scheduler is left out and says so.
    known = getattr(vllm_config.scheduler_config, "scheduler_cls", None)
    return known in (_SCHEDULER, _ASYNC_SCHEDULER)


def _obstacle(vllm_config: Any) -> str | None:
    """What stands in the way, with the remedy."""
    if vllm_config.scheduler_config.scheduler_cls is not None:
        return (
            f"scheduler_cls is {vllm_config.scheduler_config.scheduler_cls}: leave it out, for the"
            " controller is in a scheduler of its own"
        )
    if vllm_config.speculative_config.num_speculative_tokens_per_batch_size:
        return (
            "num_speculative_tokens_per_batch_size says how much to draft: leave one of the two out"
        )
    if vllm_config.speculative_config.enable_adaptive_verification:
        return (
            "enable_adaptive_verification has vLLM say how much is verified: leave one of the two"
            " out"
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        return (
            "data-parallel ranks have to draft alike: set it to false, or run the ranks as servers"
            " of their own"
        )
    return None

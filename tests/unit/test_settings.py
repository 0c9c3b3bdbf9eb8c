"""Whether an engine drafts adaptively: as the user says, else where nothing stands in the way."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_dflash.patches.vllm_config import choose_scheduler

from vllm_dflash.adaptive import settings
from vllm_dflash.adaptive.settings import SettingsError, is_adaptive, wants_adaptive
from vllm_dflash.kinds import architectures


def config(
    said: Any = None,
    *,
    scheduler_cls: Any = None,
    is_async: bool = False,
    ranks: int = 1,
    schedule: Any = None,
    verification: bool = False,
    method: str = "dflash",
) -> Any:
    return SimpleNamespace(
        additional_config={} if said is None else {"dflash": {"adaptive": said}},
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls, async_scheduling=is_async),
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
        speculative_config=SimpleNamespace(
            method=method,
            num_speculative_tokens_per_batch_size=schedule,
            enable_adaptive_verification=verification,
            draft_model_config=SimpleNamespace(architectures=[next(iter(architectures()))]),
        ),
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dflash": {"adaptve": True}}, "dflash.adaptve"),
        ({"dflash": {"adaptive": "yes"}}, "dflash.adaptive"),
        ({"dflash": True}, "dflash"),
        ({"Dflash": {"adaptive": False}}, "Dflash is no key of ours"),
        ({"vllm_dflash": {"adaptive": False}}, "vllm_dflash is no key of ours"),
        ({"vllm-dflash": {}, "dflash": {"adaptive": True}}, "vllm-dflash is no key of ours"),
        ({"adaptive": False}, 'give {"dflash": {"adaptive": false}}'),
    ],
)
def test_what_is_not_known_is_refused_by_name(given: Any, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        wants_adaptive(given)


def test_other_peoples_settings_are_left_alone() -> None:
    assert wants_adaptive({"gdn": 1}) is None
    assert wants_adaptive(object()) is None


def test_the_scheduler_that_fits() -> None:
    for is_async, name in ((False, "AdaptiveScheduler"), (True, "AdaptiveAsyncScheduler")):
        asked = config(True, is_async=is_async)
        choose_scheduler(asked)
        assert asked.scheduler_config.scheduler_cls.endswith(f".{name}")
        assert is_adaptive(asked)
        choose_scheduler(asked)  # vLLM makes its configuration more than once
        assert is_adaptive(asked)


def test_false_and_other_methods_are_left_alone() -> None:
    for asked in (config(False), config(True, method="ngram"), config(None, method="ngram")):
        choose_scheduler(asked)
        assert asked.scheduler_config.scheduler_cls is None


def test_the_default() -> None:
    """On, and under asynchronous scheduling the scheduler has the last word, where nothing was
    measured (``test_adaptive_default.py``)."""
    for is_async in (False, True):
        silent = config(None, is_async=is_async)
        choose_scheduler(silent)
        assert is_adaptive(silent)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"scheduler_cls": "their.Scheduler"}, "leave it out"),
        ({"schedule": [(1, 8, 3)]}, "leave one of the two out"),
        ({"verification": True}, "leave one of the two out"),
        ({"ranks": 2}, "set it to false"),
    ],
)
def test_what_stands_in_the_way_is_named_and_refused_only_where_it_was_asked_for(
    changes: dict[str, Any], remedy: str, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line: vLLM makes its configuration more than once."""
    settings._say.cache_clear()
    with pytest.raises(SettingsError, match=remedy):
        choose_scheduler(config(True, is_async=is_async, **changes))
    with caplog.at_level(logging.INFO, "vllm"):
        for _ in range(2):
            quiet = config(None, is_async=is_async, **changes)
            choose_scheduler(quiet)
            assert quiet.scheduler_config.scheduler_cls == changes.get("scheduler_cls")
        choose_scheduler(config(False, is_async=is_async, **changes))
    [line] = caplog.messages
    assert line.startswith("drafting is not adaptive: ")
    assert remedy in line

"""Under asynchronous scheduling the controller plans where steps were measured or the user asks for
it, and else drafts are whole; apart from an engine."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dflash import profiles
from vllm_dflash.adaptive import scheduler as module
from vllm_dflash.adaptive.scheduler import AdaptiveAsyncScheduler, AdaptiveScheduler
from vllm_dflash.cost_profile import GUESS, line
from vllm_dflash.engine_profiles import adapts, profile_key
from vllm_dflash.request_limits import Limits

pytestmark = pytest.mark.vllm
MEASURED = line((1e-3, 1e-5), (5e-4, 1e-5))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(profiles, "_kept", {})


def config(said: bool | None, is_async: bool = True) -> Any:
    """Of an engine with our scheduler."""
    model = SimpleNamespace(
        model="m",
        revision=None,
        dtype="bfloat16",
        quantization=None,
        max_model_len=99,
        hf_text_config=SimpleNamespace(hidden_size=64),
    )
    ours = AdaptiveAsyncScheduler if is_async else AdaptiveScheduler
    return SimpleNamespace(
        additional_config={} if said is None else {"dflash": {"adaptive": said}},
        model_config=SimpleNamespace(**vars(model), enforce_eager=False),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=7,
            draft_model_config=SimpleNamespace(
                **vars(model), hf_config=SimpleNamespace(block_size=8)
            ),
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=16),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(
            max_num_seqs=4,
            max_num_batched_tokens=64,
            async_scheduling=is_async,
            scheduler_cls=f"{ours.__module__}.{ours.__qualname__}",
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        use_v2_model_runner=True,
    )


def started(of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our scheduler, upon as much of vLLM's as it asks at its start."""

    def theirs(self: Any, vllm_config: Any) -> None:
        assert isinstance(self.adapts, bool), "metrics begin here"
        self.vllm_config, self.num_spec_tokens, self.requests = vllm_config, 7, {}

    monkeypatch.setattr(Scheduler, "__init__", theirs)
    monkeypatch.setattr(module.AsyncScheduler, "__init__", theirs)
    monkeypatch.setattr(module, "limits_of", lambda scheduler: Limits(7))
    monkeypatch.setattr(module, "watch", lambda scheduler, learner: True)
    ours = AdaptiveAsyncScheduler if of.scheduler_config.async_scheduling else AdaptiveScheduler
    return ours(vllm_config=of)


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("said", [None, True])
@pytest.mark.parametrize("measured", [True, False])
def test_the_default(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: bool | None,
    measured: bool,
    is_async: bool,
) -> None:
    """By a guess only where it is asked for, or under synchronous scheduling, a CPU's."""
    of = config(said, is_async)
    if measured:
        profiles.keep(*profile_key(of), MEASURED)
    with caplog.at_level(logging.INFO, "vllm"):
        scheduler = started(of, monkeypatch)
    assert scheduler.controller.profile is (MEASURED if measured else GUESS)
    plans = measured or said is True or not is_async
    assert (scheduler.adapts, scheduler._learner.is_closed) == (plans, not plans)
    if measured:
        assert caplog.messages == []
    elif plans:
        assert caplog.messages == [module._GUESSED]
    else:
        [said_once] = caplog.messages
        assert "was not measured" in said_once
        assert '{"dflash": {"adaptive": true}}' in said_once
        assert "false has it stay off without" in said_once


def test_drafts_are_whole_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = started(config(None), monkeypatch)
    taken: list[int] = []
    monkeypatch.setattr(
        module.AsyncScheduler,
        "_update_after_schedule",
        lambda self, output: taken.append(output.num_spec_tokens_to_schedule),
    )
    request = SimpleNamespace(spec_token_ids=[-1] * 7)
    scheduler.requests["a"] = request
    output = SimpleNamespace(num_spec_tokens_to_schedule=7, num_scheduled_tokens={"a": 8})
    scheduler._update_after_schedule(output)
    assert (taken, len(request.spec_token_ids)) == ([7], 7)
    assert scheduler.plan.num_draft_tokens == 7


def test_another_profile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine with other limits."""
    other = config(None)
    other.scheduler_config.max_num_seqs = 8
    profiles.keep(*profile_key(other), MEASURED)
    assert adapts(other)
    assert not adapts(config(None))


def test_not_with_another_scheduler() -> None:
    of = config(True)
    of.scheduler_config.scheduler_cls = None
    assert not adapts(of)

"""The warm-up's measurement under the V2 runner: what a worker is asked for, and what comes of
it. The worker is a stand-in (``tests/fake_worker.py``)."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fake_worker import BLOCK, FakeWorker, K, clock_of
from simulation_async import AsyncServer, h200
from vllm_dflash import profiles
from vllm_dflash.cost_profile import GUESS, Profile
from vllm_dflash.steps import Work

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(profiles, "_kept", {})


def measured(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Profile:
    """What the scheduler begins with, once the worker was measured."""
    from vllm_dflash.drafting import measure_v2
    from vllm_dflash.engine_profiles import profile_for

    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    with clock_of(worker):
        measure_v2.measure(worker)
    assert worker.ids == {}, "a request was left"
    assert not worker.running or worker.fails_at >= 0
    assert not worker.disabled
    assert not worker.model_runner.speculator.is_measured
    assert np.random.get_state()[1].tolist() == state, "seeds would be others"
    return profile_for(worker.vllm_config)


def test_the_profile_is_what_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker()
    profile = measured(worker, monkeypatch)
    assert profile is not GUESS
    for n, context in [(1, 0), (6, 0), (32, 0), (1, 1 << 14), (1, 1 << 15), (8, 1 << 11)]:
        for rows, drafts in [(1, 0), (1 + K, 0), (1, 1), (1 + K, 1)]:
            seen = n * context
            block = BLOCK * drafts
            work = Work(n, n * rows, n * block, seen, seen * rows, seen * block)
            assert profile.of(work) == pytest.approx(h200(work), rel=0.07), work
    assert [step for step in worker.steps if step[3]], "no context was measured"
    assert all(cache.eq(0).all() for cache in worker.caches), "pages are as vLLM has made them"


@pytest.mark.parametrize(
    ("num_reqs", "rate", "context"),
    [(1, 0.05, 1 << 12), (128, 0.6, 1 << 10), (256, 0.9, 1 << 17), (32, 0.3, 1 << 15)],
)
def test_with_it_drafting_is_never_slower_than_plain(
    monkeypatch: pytest.MonkeyPatch, num_reqs: int, rate: float, context: int
) -> None:
    """As simulated. With the guess the second has 0.92 of plain, the third 0.30 of a fixed K."""
    noise = np.random.default_rng(1)

    def noisy(work: Work) -> float:
        return h200(work) * float(np.exp(0.02 * noise.standard_normal()))

    worker = FakeWorker(cost=noisy, max_num_seqs=256, max_num_tokens=8192, k=15)
    server, profile = AsyncServer(num_reqs, rate, context), measured(worker, monkeypatch)
    reached = server.adaptive(500, profile)
    assert reached >= 0.98 * server.fixed(0)
    assert reached >= 0.95 * max(map(server.fixed, (3, 7, 15)))


def test_a_cache_that_a_connector_has_filled_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = FakeWorker(connector=True)
    measured(worker, monkeypatch)
    assert all(cache.eq(1).all() for cache in worker.caches)


def test_a_second_start_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeWorker(), FakeWorker()
    found = measured(first, monkeypatch)
    monkeypatch.setattr(profiles, "_kept", {})  # another process
    assert measured(second, monkeypatch) == found
    assert (len(first.steps) > 100, second.steps) == (True, [])


def test_only_where_drafting_is_adaptive(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker()
    worker.vllm_config.scheduler_config.scheduler_cls = None
    assert measured(worker, monkeypatch) is GUESS
    assert worker.steps == []


@pytest.mark.parametrize("step", [0, 1, 40])
def test_a_failure_leaves_the_guess_and_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    worker = FakeWorker()
    worker.fails_at = step
    with caplog.at_level(logging.WARNING, "vllm_dflash"):
        assert measured(worker, monkeypatch) is GUESS
    (line,) = caplog.messages
    assert "a guess stands for it: RuntimeError: no memory is left" in line
    assert not any(record.exc_info for record in caplog.records)


def test_requests_that_are_too_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm_dflash"):
        assert measured(FakeWorker(max_model_len=40), monkeypatch) is GUESS
    assert "requests of 40 tokens are too short" in caplog.text


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 24), (256, 64), (2048, 16384), (4, 2048)])
def test_no_step_is_larger_than_the_engines_are(
    monkeypatch: pytest.MonkeyPatch, seqs: int, tokens: int
) -> None:
    """The worker refuses it; and with many requests steps of all of them are measured."""
    worker = FakeWorker(max_num_seqs=seqs, max_num_tokens=tokens)
    assert measured(worker, monkeypatch) is not GUESS
    assert max(n for n, *_ in worker.steps) == min(seqs, tokens // BLOCK, 1024)


def test_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured by then is a profile, and the first load is sure to be."""
    from vllm_dflash.drafting import measure_v2

    worker = FakeWorker()
    monkeypatch.setattr(measure_v2, "SECONDS", 0.0)
    assert measured(worker, monkeypatch) is not GUESS
    assert {(n, context) for n, _, _, context in worker.steps} == {(1, 0)}


@pytest.mark.parametrize("decided", [0, 1, 3])
def test_ranks_do_what_the_first_has_decided(monkeypatch: pytest.MonkeyPatch, decided: int) -> None:
    """Each by its own clock, they would wait for each other for ever."""
    from vllm_dflash.drafting import measure

    asked = []

    def broadcast(own: bool, src: int) -> bool:
        asked.append(own)
        return len(asked) <= decided

    group = SimpleNamespace(broadcast_object=broadcast)
    monkeypatch.setattr(measure, "get_tp_group", lambda: group)
    worker = FakeWorker(ranks=2)
    measured(worker, monkeypatch)
    assert asked == [True] * (decided + 1)
    # One decision is whether to measure at all, and then one for each load.
    assert len({(n, context) for n, _, _, context in worker.steps}) == max(decided - 1, 0)


def test_a_gpu_is_asked_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which say milliseconds."""
    from vllm_dflash.drafting.measure_v2 import _clock

    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {len(made)}"
            made.append(self)

        def record(self) -> None:
            log.append(f"{self.name} recorded")

        def synchronize(self) -> None:
            log.append(f"{self.name} awaited")

        def elapsed_time(self, end: "Event") -> float:
            log.append(f"{self.name} to {end.name}")
            return 250.0

    made: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stop = _clock(torch.device("cuda"))
    assert log == ["event 0 recorded"]
    assert stop() == 0.25
    assert log[1:] == ["event 1 recorded", "event 1 awaited", "event 0 to event 1"]

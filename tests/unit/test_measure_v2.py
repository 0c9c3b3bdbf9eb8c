"""The warm-up's measurement under the V2 runner: what a worker is asked for, and what comes of
it. The worker is a stand-in that keeps to what a runner can do, with a clock of its own."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from simulation_async import AsyncServer, h200
from vllm_dflash import profiles
from vllm_dflash.adaptive import settings
from vllm_dflash.cost_profile import GUESS, Profile
from vllm_dflash.steps import Work

pytestmark = pytest.mark.vllm
K, BLOCK, PAGE = 7, 16, 32


class FakeWorker:
    """Steps take what ``cost`` says by the worker's own clock."""

    def __init__(
        self,
        *,
        cost: Callable[[Work], float] = h200,
        max_num_seqs: int = 32,
        max_num_tokens: int = 2048,
        max_model_len: int = 40960,
        num_blocks: int = 4096,
        ranks: int = 1,
        connector: bool = False,
        k: int = K,
    ) -> None:
        self.cost, self.now, self.rank, self.fails_at = cost, 0.0, 0, -1
        self.ids: dict[str, Any] = {}
        """Of the requests that are there: pages, positions, and drafts to be verified."""
        self.steps: list[tuple[int, int, int, int]] = []
        """Of each step: requests, rows a request, drafts and contexts."""
        self.running = 0
        """Steps whose output nobody has waited for."""
        model = SimpleNamespace(
            model="m",
            revision=None,
            dtype="bfloat16",
            quantization=None,
            max_model_len=max_model_len,
            enforce_eager=False,
            get_vocab_size=lambda: 500,
        )
        self.vllm_config = SimpleNamespace(
            model_config=model,
            speculative_config=SimpleNamespace(draft_model_config=model, num_speculative_tokens=k),
            cache_config=SimpleNamespace(cache_dtype="auto", block_size=PAGE),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            scheduler_config=SimpleNamespace(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_tokens,
                scheduler_cls=settings._ASYNC_SCHEDULER,
            ),
            device_config=SimpleNamespace(device_type="cpu"),
            use_v2_model_runner=True,
            kv_transfer_config=object() if connector else None,
            num_lookahead_tokens=BLOCK,
        )
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.caches = [torch.ones(4), torch.ones(2)]
        self.disabled = False
        self.model_runner = SimpleNamespace(
            device=torch.device("cpu"),
            vllm_config=self.vllm_config,
            model_config=model,
            model_state=None,
            max_model_len=max_model_len,
            max_num_reqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            kv_caches=self.caches,
            kv_cache_config=SimpleNamespace(
                num_blocks=num_blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * 2
            ),
            kv_connector=SimpleNamespace(set_disabled=lambda off: setattr(self, "disabled", off)),
            speculator=SimpleNamespace(
                num_draft_tokens=k, num_query_per_req=BLOCK, is_measured=False
            ),
        )

    def execute_model(self, scheduled: Any) -> None:
        runner = self.model_runner
        assert self.disabled
        assert runner.speculator.is_measured
        for name in scheduled.finished_req_ids:
            self.ids.pop(name, None)
        counts, drafts = scheduled.num_scheduled_tokens, scheduled.num_spec_tokens_to_schedule
        if not counts:
            return
        if len(self.steps) == self.fails_at:
            raise RuntimeError("no memory is left")
        for new in scheduled.scheduled_new_reqs:
            np.random.randint(9)  # as the sampler does for a seed
            assert len(new.prompt_token_ids) == new.num_computed_tokens + 1
            assert max(new.prompt_token_ids) < 500
            pages = min(len(each) for each in new.block_ids)
            assert all(0 < page < runner.kv_cache_config.num_blocks for page in new.block_ids[0])
            self.ids[new.req_id] = [pages, new.num_computed_tokens, 0, new.num_computed_tokens]
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            # The device counts what was accepted, the host all that might be.
            assert computed >= self.ids[name][1]
        assert sum(counts.values()) == scheduled.total_num_scheduled_tokens
        assert len(self.ids) <= runner.max_num_reqs
        assert len(counts) * BLOCK <= runner.max_num_tokens
        assert sum(counts.values()) <= runner.max_num_tokens
        verified = scheduled.scheduled_spec_decode_tokens
        for name, rows in counts.items():
            held, at, drafted, _ = self.ids[name]
            assert rows == 1 + len(verified.get(name, ()))
            assert rows - 1 <= drafted, "there is no draft to be verified"
            assert at + rows + BLOCK <= min(held * PAGE, runner.max_model_len)
            self.ids[name][1:3] = at + rows, drafts
        (rows,) = set(counts.values())
        (context,) = {context for *_, context in self.ids.values()}
        n = len(counts)
        self.steps.append((n, rows, drafts, context))
        block, seen = BLOCK * n * bool(drafts), n * context
        self.now += self.cost(
            Work(n, n * rows, block, seen, seen * rows, seen * BLOCK * bool(drafts))
        )

    def sample_tokens(self, grammar: None) -> Any:
        from vllm.v1.outputs import AsyncModelRunnerOutput

        worker = self

        class Output(AsyncModelRunnerOutput):
            def get_output(self) -> Any:
                worker.running -= 1

            def get_kv_connector_output(self) -> None:
                """Of vLLM 0.33."""

        assert self.ids
        self.running += 1
        assert self.running <= 2, "the runner's buffers are for two steps"
        return Output()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(profiles, "_kept", {})


def measured(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Profile:
    """What the scheduler begins with, once the worker was measured."""
    from vllm_dflash.drafting import measure_v2
    from vllm_dflash.engine_profiles import profile_for

    def clock(_: Any) -> Callable[[], float]:
        began = worker.now
        return lambda: worker.now - began

    monkeypatch.setattr(measure_v2, "_clock", clock)
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
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
    assert "drafting begins with a guess: RuntimeError: no memory is left" in line
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

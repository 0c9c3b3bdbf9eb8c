"""The warm-up's measurement under the V1 runner, by the clock: of a machine that is busy now and
then, and of one that is slow. What steps take is a stand-in's."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_dflash.cost_profile import Profile, line
from vllm_dflash.steps import Work

pytestmark = pytest.mark.vllm
BLOCK, REQUESTS = 8, 32


def alone(work: Work) -> float:
    """Seconds of a step on a machine that does nothing else: those of two cores."""
    return 3e-3 + 6e-5 * (work.num_tokens + work.draft_rows)


def measured(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Work, float], float]
) -> tuple[Profile, list[Work], float]:
    """The profile, the steps that were run, and how long it took; ``seconds``: of a step that
    begins at a time."""
    from vllm_dflash.drafting import measure

    clock, ran = [100.0], list[Work]()

    def step(proposer: Any, work: Work) -> Callable[[], None]:
        def run() -> None:
            ran.append(work)
            clock[0] += seconds(work, clock[0])

        return run

    def now() -> float:
        return clock[0]

    for name in ("_target", "_draft"):
        monkeypatch.setattr(measure, name, step)
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=now, perf_counter=now))
    proposer = SimpleNamespace(
        draft_block_size=BLOCK,
        num_speculative_tokens=BLOCK - 1,
        page_size=16,
        max_model_len=4096,
        device=SimpleNamespace(type="cpu"),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ),
        runner=SimpleNamespace(
            max_num_tokens=2048, kv_cache_config=SimpleNamespace(num_blocks=1025)
        ),
    )
    profile = measure._profile(proposer)  # type: ignore[arg-type]
    return profile, ran, clock[0] - 100.0


@pytest.mark.parametrize("begins", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_busy_moment_is_no_property_of_the_machine(
    begins: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a quarter of a second takes three times as long, and is measured again."""

    def seconds(work: Work, now: float) -> float:
        return alone(work) * (3 if begins <= now - 100.0 < begins + 0.25 else 1)

    profile, *_ = measured(monkeypatch, seconds)
    for rows in (1, 8, 24, 64, 128, 256):
        assert profile.of(Work(1, rows, 0)) == pytest.approx(alone(Work(1, rows, 0)), rel=0.02)
        if rows >= BLOCK:
            drafts = Work(rows // BLOCK, 0, rows)
            assert profile.parts(drafts)[1] == pytest.approx(alone(drafts), rel=0.02), rows


@pytest.mark.parametrize("seed", range(4))
def test_beside_others_that_compute(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread for each core, two of three steps wait for one of them, up to twenty times as
    long as they take, which is seen through. Where it is nine of ten, the next start measures
    again."""
    random = np.random.default_rng(seed)

    def beside(share: float) -> Profile:
        def seconds(work: Work, now: float) -> float:
            return alone(work) * (random.uniform(1.5, 20) if random.random() < share else 1)

        return measured(monkeypatch, seconds)[0]

    profile = beside(2 / 3)
    plain, whole = (profile.of(Work(1, rows, 0)) for rows in (1, 256))
    assert plain == pytest.approx(alone(Work(1, 1, 0)), rel=0.1)
    assert whole == pytest.approx(alone(Work(1, 256, 0)), rel=0.5)
    assert not beside(0.9).is_steady
    assert beside(0.0).is_steady


def test_a_step_that_is_held_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of those with more rows: it takes no longer than the next one that was
    not."""

    def seconds(work: Work, now: float) -> float:
        held_up = work.num_tokens == 1 or work.draft_rows == BLOCK
        return alone(work) * (100 if held_up else 1)

    profile, *_ = measured(monkeypatch, seconds)
    for rows in (2, 8, 256):
        assert profile.of(Work(1, rows, 0)) == pytest.approx(alone(Work(1, rows, 0)), rel=0.02)
    assert profile.of(Work(1, 1, 0)) == profile.of(Work(1, 2, 0))
    assert profile.draft_seconds(BLOCK, 0) == pytest.approx(alone(Work(1, 0, 12)), rel=0.1)


@pytest.mark.parametrize("kept", [None, False, True])
def test_what_is_measured_again(kept: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start with a kept profile of a busy moment, of a quiet one, or none."""
    from vllm_dflash.drafting import measure

    profiles = [] if kept is None else [replace(line((1.0, 0.5), (0.25, 0.125)), is_steady=kept)]
    monkeypatch.setattr(measure, "is_adaptive", lambda config: True)
    monkeypatch.setattr(measure, "profile_key", lambda config: (None, "key"))
    monkeypatch.setattr(measure, "find", lambda folder, key: next(iter(profiles), None))
    monkeypatch.setattr(measure, "keep", lambda folder, key, profile: profiles.append(profile))
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
    measure.measure_once(config, lambda: line((2.0, 0.5), (0.25, 0.125)))
    assert len(profiles) == (1 if kept in (None, True) else 2)


def test_a_slow_machine_measures_the_small_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds, and what is as small as two blocks."""
    _, ran, took = measured(monkeypatch, lambda work, now: 60 * alone(work))
    small = {work for work in ran if max(work.num_tokens, work.draft_rows) <= 2 * BLOCK}
    assert {work.num_tokens for work in small} >= {1, 2, 3, 4, 6, 8, 12, 16}
    assert {work.draft_rows for work in small} >= {8, 16}
    assert max(ran.count(work) for work in ran) == 2, "one that is not counted, and one that is"
    assert len(set(ran)) > len(small), "as long as there is time"
    assert 10 < took < 13

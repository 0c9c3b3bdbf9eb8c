"""Spreads, paired ratios, and acceptance with a denominator that holds for drafts of any length."""

import random

import pytest

from step_records import ran_of, scheduled_of, scheduler_of
from vllm_dflash.evaluation.engine_child import Clock, Watch
from vllm_dflash.evaluation.statistics import (
    DraftCounts,
    Spread,
    paired_ratio,
    percentile,
    pooled_acceptance,
    pooled_tau,
)
from vllm_dflash.steps import Steps


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([None, 4.0]) == Spread(4.0, 4.0, 4.0)
    assert Spread.of([None]) is None


def test_percentile():
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([float(i) for i in range(101)], 0.95) == 95.0


def test_a_ratio_is_taken_within_each_repeat():
    """The machine was twice as slow in repeat 2: medians divided would say 1.5 or 3, each pair says
    2."""
    method, plain = {1: 200.0, 2: 100.0, 3: 202.0}, {1: 100.0, 2: 50.0, 3: 101.0}
    assert paired_ratio(method, plain) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_needs_both_runs_of_a_repeat():
    assert paired_ratio({1: 200.0, 2: 90.0}, {1: 100.0}) == Spread(2.0, 2.0, 2.0)
    assert paired_ratio({2: 200.0}, {1: 100.0}) is None
    assert paired_ratio({1: None}, {1: 100.0}) is None


def test_conditional_acceptance_of_ragged_drafts():
    """Every token is accepted with probability 0.8 at position 0 and 0.5 after; drafts of 1 to 4
    tokens. Over all drafts, position 2 looks like 0.1."""
    generator, counts = random.Random(3), DraftCounts()
    for _ in range(40_000):
        verified = generator.randint(1, 4)
        accepted = 0
        while accepted < verified and generator.random() < (0.8 if accepted == 0 else 0.5):
            accepted += 1
        counts.observe(verified, accepted, accepted + 1)
    rates = pooled_acceptance([counts.as_dict()])
    assert rates == pytest.approx([0.8, 0.5, 0.5, 0.5], abs=0.03)
    assert counts.accepted_at.counts[2] / counts.drafts < 0.15
    assert counts.accepted == sum(counts.accepted_at.counts)


def test_counts_by_hand():
    counts = DraftCounts()
    counts.observe(verified=3, accepted=1, committed=2)
    counts.observe(verified=0, accepted=0, committed=1)
    counts.observe(verified=1, accepted=1, committed=2)
    found = counts.as_dict()
    assert (found["reached"], found["accepted_at"]) == ([2, 1, 0], [2, 0, 0])
    assert (found["tau"], found["wasted"], found["committed_per_request_step"]) == (2.0, 2, 5 / 3)
    assert pooled_acceptance([found]) == [1.0, 0.0, None]


def test_pooled_over_runs_of_different_length():
    one, other = DraftCounts(), DraftCounts()
    one.observe(1, 1, 2)
    other.observe(2, 0, 1)
    assert pooled_acceptance([one.as_dict(), other.as_dict()]) == [0.5, None]
    assert pooled_tau([one.as_dict(), other.as_dict()]) == 1.5
    assert pooled_tau([DraftCounts().as_dict()]) is None
    assert pooled_acceptance([]) == []


def test_the_watch_over_a_scheduler():
    """A prompt's step, an ended request and tokens past a request's end are not counted as
    decoding; what vLLM calls accepted is."""
    scheduler = scheduler_of(
        {"prompt": 0, "drafted": 5, "bare": 5, "ended": 9, "resumed": 3},
        ended={"ended"},
        room={"drafted": 2},
    )
    scheduled = {"prompt": 30, "drafted": 4, "bare": 1, "ended": 4, "resumed": 20, "gone": 1}
    sampled = {"prompt": [1], "drafted": [7, 8, 4], "bare": [2], "ended": [5], "resumed": [6]}
    steps, watch = Steps(scheduler), Watch(Clock())
    steps.add(watch)
    steps.around_update(scheduler.update)(
        scheduled_of(scheduled, drafts={"drafted": [7, 8, 9], "ended": [1, 2, 3]}, k=7),
        ran_of(sampled),
    )
    found = watch.counts.as_dict()
    assert [
        found[name] for name in ("request_steps", "committed", "drafts", "verified", "accepted")
    ] == [2, 3, 1, 3, 2]
    assert (found["reached"], found["accepted_at"]) == ([1, 1, 1], [1, 1, 0])
    assert (watch.steps, watch.committed, watch.decoding) == (1, 2 + 1 + 1 + 1, False)


def test_a_step_without_drafts_counts_the_same_however_it_is_read():
    """From the second on these are known to be plain, and their requests are not gone through."""
    scheduler = scheduler_of({"a": 3, "b": 4})
    steps, watch = Steps(scheduler), Watch(Clock())
    steps.add(watch)
    update = steps.around_update(scheduler.update)
    for count in (1, 2, 3):
        update(
            scheduled_of({"a": 1, "b": 1}, k=0, num_output_tokens=[3, 4]),
            ran_of({"a": [1], "b": [1]}),
        )
        assert (watch.steps, watch.committed, watch.decoding) == (count, 2 * count, True)
        assert (watch.counts.request_steps, watch.counts.committed, watch.counts.drafts) == (
            2 * count,
            2 * count,
            0,
        )

"""Spreads, paired ratios, and acceptance with a denominator that holds for drafts of any length."""

import random
from types import SimpleNamespace

import pytest

from vllm_dflash.evaluation.engine_child import Clock, Watch
from vllm_dflash.evaluation.statistics import DraftCounts, Spread, paired_ratio, percentile, pooled_acceptance, pooled_tau


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
    """The machine was twice as slow in repeat 2: medians divided would say 1.5 or 3, each pair says 2."""
    method, plain = {1: 200.0, 2: 100.0, 3: 202.0}, {1: 100.0, 2: 50.0, 3: 101.0}
    assert paired_ratio(method, plain) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_needs_both_runs_of_a_repeat():
    assert paired_ratio({1: 200.0, 2: 90.0}, {1: 100.0}) == Spread(2.0, 2.0, 2.0)
    assert paired_ratio({2: 200.0}, {1: 100.0}) is None
    assert paired_ratio({1: None}, {1: 100.0}) is None


def test_conditional_acceptance_of_ragged_drafts():
    """Every token is accepted with probability 0.8 at position 0 and 0.5 after; drafts of 1 to 4 tokens. Over all drafts, position 2 looks like 0.1."""
    generator, counts = random.Random(3), DraftCounts()
    for _ in range(40_000):
        verified = generator.randint(1, 4)
        accepted = 0
        while accepted < verified and generator.random() < (0.8 if accepted == 0 else 0.5):
            accepted += 1
        counts.observe(verified, accepted, accepted + 1)
    rates = pooled_acceptance([counts.as_dict()])
    assert rates == pytest.approx([0.8, 0.5, 0.5, 0.5], abs=0.03)
    assert counts.accepted_at[2] / counts.drafts < 0.15
    assert counts.accepted == sum(counts.accepted_at)


def test_counts_by_hand():
    counts = DraftCounts()
    counts.observe(verified=3, accepted=1, committed=2)
    counts.observe(verified=0, accepted=0, committed=1)
    counts.observe(verified=1, accepted=1, committed=2)
    assert (counts.reached, counts.accepted_at) == ([2, 1, 0], [2, 0, 0])
    found = counts.as_dict()
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


def _request(outputs: int, finished: bool = False) -> SimpleNamespace:
    return SimpleNamespace(num_output_tokens=outputs, is_finished=lambda: finished)


def test_the_watch_over_a_scheduler():
    """A prompt's step, an ended request and tokens past a request's end are not counted as decoding; what vLLM calls accepted is."""
    requests = {"prompt": _request(0), "drafted": _request(5), "bare": _request(5), "ended": _request(9, True), "resumed": _request(3)}
    scheduled = {"prompt": 30, "drafted": 4, "bare": 1, "ended": 4, "resumed": 20, "gone": 1}
    scheduler_output = SimpleNamespace(
        num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens={"drafted": [7, 8, 9], "ended": [1, 2, 3]}
    )
    sampled = {"prompt": [1], "drafted": [7, 8, 4], "bare": [2], "ended": [5], "resumed": [6]}
    runner_output = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(sampled)}, sampled_token_ids=list(sampled.values()))
    # Of the three sampled tokens the request had room for two.
    outputs = [SimpleNamespace(request_id=name, new_token_ids=tokens[:2]) for name, tokens in sampled.items()]
    scheduler = SimpleNamespace(requests=requests, update_from_output=lambda *_: {0: SimpleNamespace(outputs=outputs)})
    watch = Watch(Clock())
    scheduler.update_from_output = watch.around(scheduler.update_from_output, scheduler)
    scheduler.update_from_output(scheduler_output, runner_output)
    assert watch.counts == DraftCounts(2, 3, 1, 3, 2, [1, 1, 1], [1, 1, 0])
    assert (watch.steps, watch.decoding) == (1, False)

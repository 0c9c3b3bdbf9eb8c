"""Turns, what is recorded of them, and what a failing engine leaves of the others."""

from collections import Counter

import pytest

from vllm_dflash.engines.process import EngineFailedError
from vllm_dflash.evaluation.sweep import Sweep, turns
from vllm_dflash.evaluation.workload import Point, points

POINTS = [Point("p", None, 0.0, 1, 8), Point("p", None, 0.0, 2, 8), Point("p", None, 1.0, 1, 8)]


class FakeEngine:
    """Answers each job with its prompts' number; ends at the run of that number."""

    def __init__(self, log, name, fails_at=None, outputs="same", slices=1):
        self.slices = slices
        self.log, self.name, self.fails_at, self.outputs, self.runs = (
            log,
            name,
            fails_at,
            outputs,
            0,
        )

    def run(self, job, on_request):
        self.runs += 1
        self.log.append((self.name, len(job.prompts), job.concurrency, job.temperature))
        if self.runs == self.fails_at:
            raise EngineFailedError("ended with signal SIGSEGV", "its last words")
        for _ in job.prompts:
            on_request()
        for _ in range(self.slices - 1):
            yield
            self.log.append((self.name, "next slice"))
        return {"tokens_per_second": 100.0, "outputs": [self.outputs] * len(job.prompts)}


def sweep(engines, points=POINTS, repeats=2):
    repeats_seen = []
    made = Sweep(points, [[([1], 4)] * p.num_prompts for p in points], 0.5)
    made.run(engines, range(1, repeats + 1), repeats_seen.append)
    return made.record, repeats_seen


def test_methods_take_turns():
    """Within a repeat and point each has one turn, and over repeats and points each begins equally
    often."""
    order = list(turns(3, ["a", "b", "c"], range(1, 6)))
    assert len(set(order)) == len(order) == 3 * 3 * 6
    starts = Counter(turn.method for turn in order[::3])
    assert starts == {"a": 6, "b": 6, "c": 6}
    for at in range(0, len(order), 3):
        assert {turn.method for turn in order[at : at + 3]} == {"a", "b", "c"}
        assert len({(turn.repeat, turn.point) for turn in order[at : at + 3]}) == 1
    assert [turn.repeat for turn in order] == sorted(turn.repeat for turn in order)


def test_methods_run_slice_by_slice():
    log, again = [], "next slice"
    sweep(
        {
            "plain": FakeEngine(log, "plain", slices=2),
            "dflash": FakeEngine(log, "dflash", slices=3),
        },
        points=POINTS[:1],
        repeats=1,
    )
    names = [(name, what if what == again else "first") for name, what, *_ in log]
    warm_up = [
        ("plain", "first"),
        ("dflash", "first"),
        ("plain", again),
        ("dflash", again),
        ("dflash", again),
    ]
    other_first = [
        ("dflash", "first"),
        ("plain", "first"),
        ("dflash", again),
        ("plain", again),
        ("dflash", again),
    ]
    assert names == warm_up + other_first


def test_the_warm_up_is_not_recorded():
    log = []
    record, repeats = sweep({"plain": FakeEngine(log, "plain")})
    assert repeats == [1, 2]
    assert {run["repeat"] for run in record.runs} == {1, 2}
    assert len(record.runs) == 2 * len(POINTS)
    assert log[:3] == [("plain", 4, 1, 0.0), ("plain", 4, 2, 0.0), ("plain", 4, 1, 1.0)], (
        "a wave of requests a point"
    )
    assert log[3:6] == [("plain", 8, 1, 0.0), ("plain", 8, 2, 0.0), ("plain", 8, 1, 1.0)]


def test_engines_may_be_others_in_each_repeat():
    """Each warms up; what they measured stands together."""
    log, made = [], Sweep(POINTS, [[([1], 4)] * p.num_prompts for p in POINTS], 0.5)
    for repeat in (1, 2):
        made.run({"plain": FakeEngine(log, repeat)}, [repeat], lambda repeat: None)
    assert [name for name, *_ in log] == [1] * 6 + [2] * 6
    assert [run["repeat"] for run in made.record.runs] == [1] * 3 + [2] * 3


def test_a_swing_runs_all_its_phases_in_one_job():
    point = points(["p"], [None], [0.0], [2], None, swing=[1, 3, 1])[-1]
    assert (point.concurrency, point.num_prompts) == (3, 4 + 6 + 4)
    assert str(point) == "p, temperature 0, 1 then 3 then 1 at a time"
    log = []
    sweep({"plain": FakeEngine(log, "plain")}, points=[point])
    assert log == [("plain", 14, 3, 0.0)] * 3, "the warm-up too"


def test_a_method_that_dies_leaves_the_others():
    log = []
    record, repeats = sweep(
        {"plain": FakeEngine(log, "plain"), "bad": FakeEngine(log, "bad", fails_at=5)}
    )
    assert repeats == [1, 2]
    assert str(record.failures["bad"]) == "ended with signal SIGSEGV"
    assert record.failures["bad"].tail == "its last words"
    assert sum(run["method"] == "plain" for run in record.runs) == 6
    assert sum(run["method"] == "bad" for run in record.runs) == 1, (
        "three warm-ups and one run, then it died"
    )
    assert sum(name == "bad" for name, *_ in log) == 5


@pytest.mark.parametrize("first", ["plain", "other"])
def test_outputs_are_compared_whoever_comes_first(first):
    engines = {
        name: FakeEngine([], name, outputs="same" if name == "plain" else "else")
        for name in sorted(["plain", "other"], key=first.__ne__)
    }
    record, _ = sweep(engines)
    for run in record.runs:
        greedy = POINTS[run["point"]].temperature == 0
        assert run.get("differing_from_plain") == (
            8 if greedy and run["method"] == "other" else None
        )
        assert run.get("differing_from_own_first") == (0 if greedy else None)
        assert "outputs" not in run


def test_without_plain_nothing_is_compared_with_it():
    record, _ = sweep({"dflash": FakeEngine([], "dflash")})
    assert not any("differing_from_plain" in run for run in record.runs)

"""The order of a benchmark, and the record of its runs. No vLLM import.

For each repeat, for each point, the methods take turns, a slice of a second or less each until all
are done: a machine that slows down for some seconds slows down all. No method always comes first.
Repeat 0 warms up and is not measured.

    pytest tests/unit/test_bench_sweep.py
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from vllm_dflash.engines.process import EngineFailedError
from vllm_dflash.evaluation.job import Engine, Job
from vllm_dflash.evaluation.workload import Phase, Point
from vllm_dflash.progress import Progress

BASELINE = "plain"
_LEAST_WARM_UP = 4
"""Requests."""


@dataclass(frozen=True)
class Turn:
    """One method at one point; repeat 0 is the warm-up."""

    repeat: int
    point: int
    method: str


def turns(num_points: int, methods: Sequence[str], repeats: Iterable[int]) -> Iterator[Turn]:
    """Every turn, in order, the warm-up's first."""
    for repeat in [0, *repeats]:
        for point in range(num_points):
            first = (repeat + point) % len(methods)
            for method in [*methods[first:], *methods[:first]]:
                yield Turn(repeat, point, method)


@dataclass
class Record:
    """The measured runs, and why methods stopped."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    """What the engine measured, with ``repeat``, ``point`` (index) and ``method``."""
    failures: dict[str, EngineFailedError] = field(default_factory=dict)

    def at(self, point: int, method: str) -> dict[int, dict[str, Any]]:
        """By repeat, the runs of a method at a point."""
        return {
            run["repeat"]: run
            for run in self.runs
            if (run["point"], run["method"]) == (point, method)
        }


class Sweep:
    """Runs the turns on engines that are ready; ``requests`` holds each point's, prompts and how
    many tokens they generate."""

    def __init__(
        self,
        points: Sequence[Point],
        requests: Sequence[Sequence[tuple[list[int], int]]],
        slice_seconds: float,
    ) -> None:
        self.record = Record()
        self._points, self._requests, self._slice_seconds = points, requests, slice_seconds
        self._engines: dict[str, Engine] = {}
        self._first_outputs: dict[tuple[int, str], list[str]] = {}

    def run(
        self,
        engines: Mapping[str, Engine],
        repeats: Sequence[int],
        after_repeat: Callable[[int], None],
    ) -> None:
        """Warms up and measures these repeats, counted from 1; a method that fails is left out from
        then on.

        Calls ``after_repeat`` with each measured repeat that is complete.
        """
        self._engines = dict(engines)
        order = list(turns(len(self._points), list(engines), repeats))
        total = sum(len(self._job(turn).prompts) for turn in order)
        with Progress(total=total, unit=" requests", smoothing=0.05, dynamic_ncols=True) as bar:
            for repeat, in_repeat in groupby(order, key=lambda turn: turn.repeat):
                for _, at_point in groupby(in_repeat, key=lambda turn: turn.point):
                    self._take(list(at_point), bar)
                if repeat:
                    after_repeat(repeat)

    def _job(self, turn: Turn) -> Job:
        """The turn's job; a warm-up is one wave of requests, or the whole swing."""
        point, requests, phases = (
            self._points[turn.point],
            self._requests[turn.point],
            self._points[turn.point].phases,
        )
        if not (turn.repeat or point.swing):
            count = min(point.num_prompts, max(point.concurrency, _LEAST_WARM_UP))
            requests, phases = requests[:count], [Phase(point.concurrency, count)]
        prompts, max_tokens = zip(*requests, strict=True)
        return Job(
            prompts, phases, max_tokens, point.temperature, slice_seconds=self._slice_seconds
        )

    def _take(self, at_point: Sequence[Turn], bar: Any) -> None:
        """Runs the methods' turns at a point, slice by slice, and files their results."""
        what = f"repeat {at_point[0].repeat}" if at_point[0].repeat else "warming up"
        bar.set_description(f"{what}: {self._points[at_point[0].point]}")
        running, outputs = {}, {}
        for turn in at_point:
            job = self._job(turn)
            if turn.method in self.record.failures:
                bar.update(len(job.prompts))
            else:
                running[turn] = self._engines[turn.method].run(job, bar.update)
        while running:
            for turn, slices in list(running.items()):
                try:
                    next(slices)
                except StopIteration as end:
                    del running[turn]
                    outputs[turn] = self._file(turn, end.value)
                except EngineFailedError as error:
                    del running[turn]
                    self.record.failures[turn.method] = error
                    bar.write(f"{turn.method} {error}")
        self._compare({turn: found for turn, found in outputs.items() if found is not None})

    def _file(self, turn: Turn, result: dict[str, Any]) -> list[str] | None:
        """Records a turn; returns digests of the outputs where they can be compared."""
        outputs = result.pop("outputs", None)
        if not turn.repeat:
            return None
        self.record.runs.append(
            {"repeat": turn.repeat, "point": turn.point, "method": turn.method, **result}
        )
        return None if self._points[turn.point].temperature else outputs

    def _compare(self, outputs: Mapping[Turn, list[str]]) -> None:
        """Counts, for the greedy outputs of one point in one repeat, those that differ from plain
        decoding's, and from the method's own first."""
        plain = next((found for turn, found in outputs.items() if turn.method == BASELINE), None)
        for turn, found in outputs.items():
            run = self.record.at(turn.point, turn.method)[turn.repeat]
            first = self._first_outputs.setdefault((turn.point, turn.method), found)
            run["differing_from_own_first"] = _differing(found, first)
            if plain is not None and turn.method != BASELINE:
                run["differing_from_plain"] = _differing(found, plain)


def _differing(outputs: Sequence[str], others: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(outputs, others, strict=True))

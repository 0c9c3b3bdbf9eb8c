"""The proof that adaptive drafting is never slower, by engines of known speed.

pytest tests/unit/test_prove_adaptive.py
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prove_adaptive
from prove_adaptive import SHORT_ONLY, Part, measure, verdicts, write_report
from vllm_dflash.evaluation.job import Job
from vllm_dflash.evaluation.methods import FIXED, Method
from vllm_dflash.evaluation.plan import Plan
from vllm_dflash.evaluation.summary import BEST_FIXED
from vllm_dflash.evaluation.workload import Lengths, Point, PromptSet

POINTS = [Point("text", length, 0.0, 2, 2) for length in (128, 2048)]
METHODS = [
    Method("plain", "plain"),
    Method("dflash", FIXED, "d", 7),
    Method(SHORT_ONLY, FIXED, "d", 7),
    Method("adaptive", "adaptive", "d", 7),
]


class Engine:
    """Says that it is as fast as it was told, for one run after the other."""

    def __init__(self, rates: list[float]) -> None:
        self.rates, self.jobs = rates, []

    def run(
        self, job: Job, on_request: Callable[[], object]
    ) -> Generator[None, None, dict[str, Any]]:
        self.jobs.append(job)
        yield
        return {
            "tokens_per_second": self.rates[len(self.jobs) % len(self.rates)],
            "tokens_per_cpu_second": 1.0,
            "requests": 2,
        } | dict.fromkeys(("drafts", "accepted"), 0)


class Fake(Part):
    """With such engines in place of vLLM's."""

    starts = 0

    def engines(self, stack: ExitStack, logs: Path) -> Any:
        Fake.starts += 1
        return {name: Engine(rates) for name, rates in RATES.items()}


RATES = {"plain": [100.0], "dflash": [80.0], SHORT_ONLY: [110.0], "adaptive": [120.0]}


def part(bounds: dict[str, float], is_steady: bool = True) -> Fake:
    prompts = PromptSet("text", [[1] * 64, [2] * 64])
    plan = Plan("t", METHODS, POINTS, {"text": prompts}, Lengths(8, 8), 3, "float32", 4096, {})
    Fake.starts = 0
    return Fake(plan, bounds, (), is_steady)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    lines, asked = tmp_path / "lines", part({"plain": 0.97})
    assert len(measure(asked, lines, tmp_path, 2, "of 128 ").runs) == 2 * len(METHODS)
    assert Fake.starts == 1
    found = measure(asked, lines, tmp_path, 2, "")
    assert (len(found.runs), Fake.starts) == (2 * 2 * len(METHODS), 2)
    assert measure(asked, lines, tmp_path, 2, "").runs == found.runs
    assert Fake.starts == 2, "nothing was left to do"
    assert len(measure(asked, lines, tmp_path, 3, "").runs) == 3 * 2 * len(METHODS)


def test_the_bench_starts_its_engines_for_each_repeat(tmp_path: Path) -> None:
    asked, lines = part({}, is_steady=False), tmp_path / "lines"
    record = measure(asked, lines, tmp_path, 3, "")
    assert Fake.starts == 3
    write_report(asked.plan, record, lines, tmp_path / "report")
    assert "| plain | 100.0 |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("rates", "state"),
    [
        ([120.0], "holds 1.200"),
        ([90.0, 95.0, 100.0], "open 0.950"),
        ([90.0, 95.0, 96.0], "FAILS 0.950"),
    ],
)
def test_a_bound_is_open_where_it_lies_between_the_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[float], state: str
) -> None:
    monkeypatch.setitem(RATES, "adaptive", rates)
    asked = part({"plain": 0.97})
    lines = verdicts(asked, measure(asked, tmp_path / "lines", tmp_path, 3, ""), 0)
    assert lines[1].startswith(f"  {state} x plain, asked 0.97  each ")
    each = lines[1].partition("each ")[2].split()
    assert sorted(map(float, each)) == sorted(r / 100 for r in (rates * 3)[:3])


def test_a_mixed_batch_is_held_against_the_best_of_three(tmp_path: Path) -> None:
    asked = part({BEST_FIXED: 0.97})
    lines = verdicts(asked, measure(asked, tmp_path / "lines", tmp_path, 1, ""), 0)
    assert lines[1].startswith(f"  holds 1.091 x {BEST_FIXED} ({SHORT_ONLY})")


def test_only_short_requests_end_meanwhile() -> None:
    asked = part({})
    assert [n for _, n in asked.requests(POINTS[1])] == [1024, 1024]
    tokens = [n for _, n in asked.requests(POINTS[0])]
    assert tokens == prove_adaptive.TOKENS.take(2)

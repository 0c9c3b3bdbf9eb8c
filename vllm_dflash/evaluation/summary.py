"""From runs to rows: medians with spread, and ratios to what ran beside. Pure.

A ratio is taken within a repeat, between runs that took turns, and only then is the median taken;
where a baseline did not run there is none.

    pytest tests/unit/test_bench_report.py
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_dflash.evaluation.methods import FIXED, Method
from vllm_dflash.evaluation.statistics import Spread, paired_ratio, pooled_acceptance, pooled_tau
from vllm_dflash.evaluation.sweep import BASELINE, Record

FIGURES = (
    "tokens_per_second",
    "early_tokens_per_second",
    "step_ms",
    "step_p95_ms",
    "tpot_p50_ms",
    "tpot_p95_ms",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "committed_per_request_step",
    "verified",
    "wasted",
    "steps",
    "memory_mib",
)
"""Of a run, summarised over the repeats."""
RATIOS = ("tokens_per_second", "early_tokens_per_second", "step_ms")
BEST_FIXED = "best fixed"
BEST_SCHEDULE = "best schedule"
"""Of a load in phases: each with the fixed choice that was the fastest in it, known in
hindsight."""


def rows(record: Record, num_points: int, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """A row for each point and method that has a run, ratios to plain and native included, and for
    adaptive to the best fixed K."""
    found = []
    for point in range(num_points):
        runs = {method.name: record.at(point, method.name) for method in methods}
        for method in methods:
            if not runs[method.name]:
                continue
            baselines = {
                m.name: m.name
                for m in methods
                if m.kind in (BASELINE, "native") and m.name != method.name
            }
            fixed = _fixed(method, methods, runs) if method.kind == "adaptive" else []
            if fixed:
                baselines[BEST_FIXED] = _best(fixed, runs)
                if schedule := _best_schedule(fixed, runs):
                    runs[BEST_SCHEDULE] = schedule
                    baselines[BEST_SCHEDULE] = BEST_SCHEDULE
            found.append(_row(point, method.name, runs, baselines))
    return found


def _row(
    point: int,
    method: str,
    runs: Mapping[str, dict[int, dict[str, Any]]],
    baselines: Mapping[str, str],
) -> dict[str, Any]:
    own = list(runs[method].values())
    row: dict[str, Any] = {"point": point, "method": method, "repeats": len(own)}
    for name in FIGURES:
        row[name] = _spread(Spread.of([run.get(name) for run in own]))
    row["tau"] = pooled_tau(own)
    row["acceptance"] = pooled_acceptance([run for run in own if "reached" in run])
    for name in ("differing_from_plain", "differing_from_own_first", "preemptions"):
        known = [run[name] for run in own if run.get(name) is not None]
        row[name] = max(known) if known else None
    agreeing = [run["agrees_with_vllm"] for run in own if "agrees_with_vllm" in run]
    row["agrees_with_vllm"] = all(agreeing) if agreeing else None
    row["requests"] = own[0]["requests"]
    row["phases"] = [
        _phase([run["phases"][i] for run in own]) for i in range(len(own[0].get("phases", ())))
    ]
    row["against"] = {
        label: (
            {"method": other}
            | {
                name: _spread(paired_ratio(_values(runs[method], name), _values(runs[other], name)))
                for name in RATIOS
            }
        )
        for label, other in baselines.items()
        if runs[other]
    }
    return row


def _fixed(
    adaptive: Method, methods: Sequence[Method], runs: Mapping[str, dict[int, dict[str, Any]]]
) -> list[str]:
    """Fixed K of the same drafter that ran, and K = 0; none where no fixed K ran."""
    fixed = [
        m
        for m in methods
        if runs[m.name]
        and (m.kind == BASELINE or (m.kind == FIXED and m.drafter == adaptive.drafter))
    ]
    return [] if all(m.kind == BASELINE for m in fixed) else [m.name for m in fixed]


def _best(fixed: Sequence[str], runs: Mapping[str, dict[int, dict[str, Any]]]) -> str:
    """The one with the highest median throughput."""
    spreads = {
        name: Spread.of(list(_values(runs[name], "tokens_per_second").values())) for name in fixed
    }
    return max(spreads, key=lambda name: spread.median if (spread := spreads[name]) else 0.0)


def _best_schedule(
    fixed: Sequence[str], runs: Mapping[str, dict[int, dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    """Runs of the fixed choices that were the fastest in the median of each phase; none where the
    load has one phase."""
    phases = {
        name: {repeat: run.get("phases", ()) for repeat, run in runs[name].items()}
        for name in fixed
    }
    first = next(iter(phases[fixed[0]].values()))
    if len(first) < 2:
        return {}

    def seconds(name: str, phase: int) -> float:
        return statistics.median(run[phase]["seconds"] for run in phases[name].values())

    chosen = [min(fixed, key=lambda name: seconds(name, phase)) for phase in range(len(first))]
    tokens = sum(phase["tokens"] for phase in first)
    repeats = set.intersection(*(set(phases[name]) for name in chosen))
    return {
        repeat: {
            "tokens_per_second": (
                tokens / sum(phases[name][repeat][i]["seconds"] for i, name in enumerate(chosen))
            )
        }
        for repeat in repeats
    }


def _phase(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [phase["seconds"] for phase in own]
    return {
        "concurrency": own[0]["concurrency"],
        "seconds": _spread(Spread.of(seconds)),
        "tau": pooled_tau(own),
    }


def _values(runs: Mapping[int, dict[str, Any]], name: str) -> dict[int, float | None]:
    return {repeat: run.get(name) for repeat, run in runs.items()}


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)

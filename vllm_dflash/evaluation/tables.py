"""A benchmark's results as tables of text, for Markdown and HTML alike. Pure.

pytest tests/unit/test_bench_report.py
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from vllm_dflash.evaluation.statistics import EARLY_STEPS
from vllm_dflash.evaluation.summary import BEST_FIXED, BEST_SCHEDULE
from vllm_dflash.evaluation.sweep import BASELINE

NONE = "–"
_EXACT = "float32"
_CHOICES = frozenset({BEST_FIXED, BEST_SCHEDULE})
_EARLY = f"x {BASELINE}, first {EARLY_STEPS} steps"


@dataclass
class Table:
    """A title, rows of text under a header, and notes."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def group_title(point: Mapping[str, Any]) -> str:
    """What the rows of one table share."""
    length = (
        "" if point["prompt_tokens"] is None else f", prompts of {point['prompt_tokens']} tokens"
    )
    swing = point.get("swing") or ()
    load = ", requests at a time in phases: " + ", ".join(map(str, swing)) if swing else ""
    return f"{point['prompt_set']}{length}, temperature {point['temperature']:g}{load}"


def groups(results: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each prompt set, prompt length and temperature, with their title, in the order of
    the sweep."""

    def title(row: Mapping[str, Any]) -> str:
        return group_title(results["points"][row["point"]])

    for name, members in groupby(results["rows"], key=title):
        yield name, list(members)


def facts(results: Mapping[str, Any]) -> list[str]:
    """What was measured, where, with what, and how to read it; a line each."""
    settings, machine = results["settings"], results["machine"]
    engines = [m["engine"] for m in results["methods"] if m.get("engine")]
    device = f", {engines[0]['device']}" if engines and engines[0]["device"] != "CPU" else ""
    threads = sorted({engine["threads"] for engine in engines if "threads" in engine})
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{device}"
    lines = [
        f"`{shlex.join(results['command'])}`",
        where + (f"; {' or '.join(map(str, threads))} threads an engine" if threads else ""),
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in settings.items()
            if value is not None
        ),
        f"begun {results['began']}, {results['seconds']:.0f} s"
        + (
            ""
            if results["complete"]
            else f"; NOT COMPLETE: {results['repeats_done']} of {settings['repeats']} repeats"
        ),
        (
            "median over the repeats (lowest–highest); ratios are taken within a repeat, in which"
            " the methods take turns"
        ),
        (
            "tau: one plus accepted tokens over drafts; a step: one forward of the target with no"
            " prompt in it; wasted: verified tokens that were rejected"
        ),
    ]
    return lines


def method_table(results: Mapping[str, Any]) -> Table:
    """Every method that was asked for: what it is, or why it did not run."""
    rows = [[m["name"], m["what"], m["state"], m["reason"] or ""] for m in results["methods"]]
    return Table("Methods", ["method", "what it is", "", "reason"], rows)


def overview_table(results: Mapping[str, Any]) -> Table | None:
    """A method a row: tau and speed by prompt set and temperature at the lowest load, and the least
    speed at any point. None where there is but one table of figures."""
    steady = [point for point in results["points"] if not point.get("swing")]
    columns = list(dict.fromkeys(map(group_title, steady)))
    if len(columns) < 2 or not results["rows"]:
        return None
    fewest = min(point["concurrency"] for point in steady)
    cells: dict[str, dict[str, str]] = {}
    least: dict[str, tuple[float, str]] = {}
    for row in results["rows"]:
        point, own = _point(results, row), cells.setdefault(row["method"], {})
        ratio = row["against"].get(BASELINE, {}).get("tokens_per_second")
        if point["concurrency"] == fewest and not point.get("swing"):
            tau = NONE if row["tau"] is None else f"{row['tau']:.2f}"
            own[group_title(point)] = tau if ratio is None else f"{tau}; {ratio['median']:.2f}"
        if ratio is not None:
            where = f"{group_title(point)}, {point['concurrency']} at a time"
            found = ratio["median"], f"{ratio['median']:.2f}: {where}"
            least[row["method"]] = min(least.get(row["method"], found), found)
    rows = [
        [method, *(own.get(column, NONE) for column in columns)] for method, own in cells.items()
    ]
    title, header = "tau", ["method", *columns]
    if least:
        title, header = f"tau; x {BASELINE}", [*header, f"least x {BASELINE} anywhere"]
        for row_of in rows:
            row_of.append(least[row_of[0]][1] if row_of[0] in least else NONE)
    return Table(f"{title}: {fewest} at a time", header, rows)


def speed_table(results: Mapping[str, Any], title: str, rows: list[dict[str, Any]]) -> Table:
    """Throughput, step time, acceptance, latency, memory and outputs."""
    found = dict.fromkeys(label for row in rows for label in row["against"])
    labels = sorted(found, key=lambda label: (label != BASELINE, label in _CHOICES))
    header = ["requests at a time", "method", "tokens/s"]
    for label in labels:
        header += (
            [f"x {label}", _EARLY]
            if label == BASELINE
            else [f"x {label}"]
            if label in _CHOICES
            else [f"x {label}", f"step x {label}"]
        )
    header += [
        "step, ms",
        "tau",
        "committed a request-step",
        "verified",
        "wasted",
        "ms a token, p50 / p95",
        "ms to first token, p50 / p95",
        "peak MiB",
        "output equals plain's",
    ]
    table = Table(title, header, [_speed_row(results, row, labels) for row in rows])
    table.notes = _notes(results, rows)
    return table


def phase_table(results: Mapping[str, Any], title: str, rows: list[dict[str, Any]]) -> Table | None:
    """Of a load in phases, seconds and tau of each; None of another."""
    longest: list[dict[str, Any]] = max((row["phases"] for row in rows), key=len, default=[])
    if len(longest) < 2:
        return None
    cells = []
    for row in rows:
        found = [
            spread(p["seconds"], ".2f") + ("" if p["tau"] is None else f", {p['tau']:.2f}")
            for p in row["phases"]
        ]
        cells.append([row["method"], *found])
    return Table(
        f"Seconds and tau, phase by phase: {title}",
        ["method", *(f"{p['concurrency']} at a time" for p in longest)],
        cells,
    )


def acceptance_table(
    results: Mapping[str, Any], title: str, rows: list[dict[str, Any]]
) -> Table | None:
    """How often the draft token at a position is accepted once all before it were; None where
    nothing was drafted."""
    drafted = [row for row in rows if row["acceptance"]]
    if not drafted:
        return None
    length = max(len(row["acceptance"]) for row in drafted)
    cells = []
    for row in drafted:
        rates = [NONE if rate is None else f"{rate:.2f}" for rate in row["acceptance"]]
        cells.append(
            [
                str(_point(results, row)["concurrency"]),
                row["method"],
                *rates,
                *[NONE] * (length - len(rates)),
            ]
        )
    header = ["requests at a time", "method", *(str(i + 1) for i in range(length))]
    return Table(f"Accepted at position, once all before were: {title}", header, cells)


def _speed_row(results: Mapping[str, Any], row: Mapping[str, Any], labels: list[str]) -> list[str]:
    point = _point(results, row)
    cells = [str(point["concurrency"]), row["method"], spread(row["tokens_per_second"], ".1f")]
    for label in labels:
        against = row["against"].get(label)
        ratio = NONE if against is None else spread(against["tokens_per_second"], ".2f")
        if label == BEST_FIXED and against is not None:
            ratio += f" {against['method']}"
        cells.append(ratio)
        if label not in _CHOICES:
            beside = "early_tokens_per_second" if label == BASELINE else "step_ms"
            cells.append(NONE if against is None else spread(against[beside], ".2f"))
    verified, wasted = row["verified"], row["wasted"]
    share = (
        f"{wasted['median'] / verified['median']:.0%}"
        if verified and wasted and verified["median"]
        else NONE
    )
    return [
        *cells,
        spread(row["step_ms"], ".2f"),
        NONE if row["tau"] is None else f"{row['tau']:.2f}",
        median(row["committed_per_request_step"], ".2f"),
        median(verified, ",.0f") if verified and verified["median"] else NONE,
        share,
        f"{median(row['tpot_p50_ms'], '.2f')} / {median(row['tpot_p95_ms'], '.2f')}",
        f"{median(row['ttft_p50_ms'], '.1f')} / {median(row['ttft_p95_ms'], '.1f')}",
        median(row["memory_mib"], ",.0f"),
        _equality(results, row, point),
    ]


def _equality(results: Mapping[str, Any], row: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """In float32 speculation is lossless, so yes or no; in other dtypes rounding may part outputs,
    so how many."""
    differing = row["differing_from_plain"]
    if differing is None:
        return NONE
    if not differing:
        return "yes"
    count = f"{differing} of {point['num_prompts']} differ"
    return f"NO: {count}" if results["settings"].get("dtype") == _EXACT else count


def _notes(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        where = f"{row['method']} at {_point(results, row)['concurrency']}"
        if row["repeats"] < results["settings"]["repeats"] and results["complete"]:
            notes.append(
                f"{where}: {row['repeats']} of {results['settings']['repeats']} repeats, then it"
                " ended."
            )
        if row["agrees_with_vllm"] is False:
            notes.append(
                f"{where}: vLLM's own counters differ from what its scheduler was seen to verify"
                " and accept."
            )
        if row["preemptions"]:
            notes.append(
                f"{where}: {row['preemptions']} preemptions; the KV cache is too small, and waiting"
                " is part of the figures."
            )
        if row["differing_from_own_first"]:
            notes.append(
                f"{where}: {row['differing_from_own_first']} outputs differ from those of its own"
                " first repeat."
            )
    return notes


def spread(value: Mapping[str, float] | None, form: str) -> str:
    """``median (low–high)``, or the median alone of a single repeat."""
    if value is None:
        return NONE
    if value["low"] == value["high"]:
        return format(value["median"], form)
    return (
        f"{format(value['median'], form)}"
        f" ({format(value['low'], form)}–{format(value['high'], form)})"
    )


def median(value: Mapping[str, float] | None, form: str) -> str:
    return NONE if value is None else format(value["median"], form)


def _point(results: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    return results["points"][row["point"]]

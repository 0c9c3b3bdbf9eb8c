"""The files of a benchmark: results.json, report.md, and report.html where plots can be drawn.

pytest tests/unit/test_bench_report.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.evaluation.html import page
from vllm_dflash.evaluation.lengths import break_even_of, length_tables
from vllm_dflash.evaluation.tables import (
    NONE,
    Table,
    acceptance_table,
    facts,
    groups,
    median,
    method_table,
    overview_table,
    phase_table,
    speed_table,
    spread,
)
from vllm_dflash.files import put


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes all files anew; each is whole at any time, whatever interrupts."""
    put(folder / "results.json", json.dumps(results, indent=1))
    put(folder / "report.md", as_markdown(results))
    put(folder / "report.html", page(results))


def as_markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    lines = ["# vllm-dflash bench", "", *[f"- {line}" for line in facts(results)], ""]
    for table in all_tables(results):
        lines += [
            f"## {table.title}",
            "",
            *_markdown(table),
            "",
            *(f"- {note}" for note in table.notes),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def all_tables(results: Mapping[str, Any]) -> list[Table]:
    """In the order of the report."""
    overview = overview_table(results)
    tables = [method_table(results), *length_tables(results), *([overview] if overview else [])]
    for title, rows in groups(results):
        tables.append(speed_table(results, title, rows))
        tables += [
            table
            for make in (phase_table, acceptance_table)
            if (table := make(results, title, rows)) is not None
        ]
    return tables


def short_lines(results: Mapping[str, Any]) -> list[str]:
    """For the terminal: a line for each method that did not run, and for each row."""
    lines = [f"{m['name']}: {m['reason']}" for m in results["methods"] if m["reason"]]
    width = max((len(row["method"]) for row in results["rows"]), default=0)
    for title, rows in groups(results):
        lines += [
            "",
            f"{title}",
            (
                f"{'requests':>8}  {'method':<{width}} {'tokens/s':>9} {'tau':>6} {'step, ms':>9} "
                " x plain"
            ),
        ]
        for row in rows:
            plain = row["against"].get("plain")
            needed = break_even_of(row) if results["settings"].get("break_even") else None
            lines.append(
                f"{results['points'][row['point']]['concurrency']:>8}  {row['method']:<{width}}"
                f" {median(row['tokens_per_second'], '.1f'):>9}"
                f" {NONE if row['tau'] is None else format(row['tau'], '.2f'):>6}"
                f" {median(row['step_ms'], '.2f'):>9} "
                f" {'' if plain is None else spread(plain['tokens_per_second'], '.2f')}"
                f"{'' if needed is None else '; breaks even at tau ' + spread(needed, '.2f')}"
            )
    return lines


def _markdown(table: Table) -> list[str]:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in rows
    ]

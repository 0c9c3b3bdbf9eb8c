"""Figures over prompt lengths, and the tau at which drafting breaks even. Pure.

pytest tests/unit/test_bench_lengths.py
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from vllm_dflash.evaluation.sweep import BASELINE
from vllm_dflash.evaluation.tables import NONE, Table, median, spread

_ACCEPTED = 1.02
"""tau above which drafts were not as good as all rejected."""


def positions_of(config: Any) -> int | None:
    """Positions of a target by its text config, as vLLM derives them; None where it names none."""
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    # Of the other kinds max_position_embeddings is what it is with the factor.
    factor = rope.get("factor") if kind in ("linear", "dynamic") else None
    return most and int(most * (factor or 1))


def length_groups(results: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each prompt set and temperature that ran at several prompt lengths, with their
    title; without loads in phases."""

    def key(row: Mapping[str, Any]) -> tuple[str, float]:
        point = results["points"][row["point"]]
        return point["prompt_set"], point["temperature"]

    steady = [row for row in results["rows"] if not results["points"][row["point"]].get("swing")]
    for (name, temperature), members in groupby(sorted(steady, key=key), key=key):
        rows = list(members)
        if results["settings"].get("break_even") or len(lengths_of(results, rows)) > 1:
            yield f"{name}, temperature {temperature:g}", rows


def lengths_of(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Prompt lengths of these rows, in order; None for prompts as they are."""
    found = {results["points"][row["point"]]["prompt_tokens"] for row in rows}
    return sorted(found, key=lambda length: length or 0)


def length_tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for each of ``length_groups``: a length a column; none without several lengths."""
    if results["settings"].get("break_even"):
        return [_break_even(results, title, rows) for title, rows in length_groups(results)]
    return [_figures(results, title, rows) for title, rows in length_groups(results)]


def break_even_of(row: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The tau at which drafting breaks even, with its spread over the repeats: a step that drafts
    and verifies over a plain one."""
    found: Mapping[str, float] | None = row["against"].get(BASELINE, {}).get("step_ms")
    return found


def _figures(results: Mapping[str, Any], title: str, rows: list[dict[str, Any]]) -> Table:
    def cell(row: Mapping[str, Any]) -> str:
        against = row["against"].get(BASELINE)
        speed = (
            median(row["tokens_per_second"], ".1f") + " tokens/s"
            if against is None
            else spread(against["tokens_per_second"], ".2f")
        )
        tau = "" if row["tau"] is None else f"; tau {row['tau']:.2f}"
        return f"{speed}{tau}; {median(row['step_ms'], '.2f')} ms"

    return _table(results, f"By prompt length, x {BASELINE}; tau; ms a step: {title}", rows, cell)


def _break_even(results: Mapping[str, Any], title: str, rows: list[dict[str, Any]]) -> Table:
    drafted = [row for row in rows if row["method"] != BASELINE]
    table = _table(
        results,
        f"tau at which drafting breaks even: {title}",
        drafted,
        lambda row: spread(break_even_of(row), ".2f"),
    )
    table.notes.append(
        "Milliseconds of a step whose drafts are all rejected over those of a plain step. A drafter"
        " pays where its tau is above."
    )
    if any(NONE in row for row in table.rows):
        table.notes.append(f"{NONE}: not measured, for no step there was all decoding.")
    for row in drafted:
        if row["tau"] is not None and row["tau"] > _ACCEPTED:
            point = results["points"][row["point"]]
            table.notes.append(
                f"{row['method']} at {point['concurrency']}, {_name(point['prompt_tokens'])}: tau"
                f" was {row['tau']:.2f}, so not all drafts were rejected."
            )
    return table


def _table(
    results: Mapping[str, Any], title: str, rows: Sequence[Mapping[str, Any]], cell: Any
) -> Table:
    """Requests at a time and method by row, a prompt length by column."""
    columns = lengths_of(results, rows)
    cells: dict[tuple[int, str], dict[int | None, str]] = {}
    for row in rows:
        point = results["points"][row["point"]]
        own = cells.setdefault((point["concurrency"], row["method"]), {})
        own[point["prompt_tokens"]] = cell(row)
    order = {m["name"]: i for i, m in enumerate(results["methods"])}
    keys = sorted(cells, key=lambda key: (key[0], order[key[1]]))
    return Table(
        title,
        ["requests at a time", "method", *map(_name, columns)],
        [
            [str(load), method, *(cells[load, method].get(column, NONE) for column in columns)]
            for load, method in keys
        ],
    )


def _name(length: int | None) -> str:
    return "prompts as they are" if length is None else f"{length} tokens"

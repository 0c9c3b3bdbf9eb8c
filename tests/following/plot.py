"""Tables of ``following.curve`` as a plot, and as Markdown in a document. Needs matplotlib for the
plot alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
LABELS = {
    "own text": "its own target, on the text it knows",
    "before": "its own target, on the new text",
    "int8 alone": "its own target in 8 bits, on the new text",
    "after": "the fine-tuned target, on the new text",
}
COLORS = {"own text": "C2", "before": "C1", "int8 alone": "C4", "after": "C3"}
BEGIN, END = "<!-- curve: by tests/follow_plot.py -->", "<!-- curve: its end -->"


def plot(tables: Mapping[str, Rows], path: Path) -> None:
    """tau against minutes with its interval, a panel a table under its name; the old drafter's tau
    with each target as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 4.4 * len(tables), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        levels = {row["state"]: row["tau"] for row in rows if row["minutes"] is None}
        marks = [row for row in rows if row["minutes"] is not None]
        first = [(0.0, levels["after"], 0.0)] if "after" in levels else []
        points = [*first, *((row["minutes"], row["tau"], row["half"]) for row in marks)]
        if points:
            at, taus, half = zip(*points, strict=True)
            drawn = axes.errorbar(at, taus, yerr=half, marker="o", markersize=4, capsize=2)
            handles["the drafter as it is refreshed, 95 % interval of what it gained"] = drawn
        for state, value in levels.items():
            line = axes.axhline(value, color=COLORS[state], linestyle=":", linewidth=1.2)
            handles[f"the old drafter with {LABELS[state]}"] = line
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("minutes of training")
        axes.set_ylim(bottom=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tau")
    figure.legend(handles.values(), handles, loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def markdown(tables: Mapping[str, Rows]) -> str:
    """A table of all: a row a state, a column a table."""
    keys = list(dict.fromkeys(_key(row) for rows in tables.values() for row in rows))
    keys.sort(key=lambda key: (key[1] is not None, key[1] or 0.0))
    by = [{_key(row): row for row in rows} for rows in tables.values()]
    lines = [f"| | {' | '.join(f'tau, {name}' for name in tables)} |"]
    lines.append("|---|" + "---|" * len(tables))
    for state, minutes in keys:
        said = f"the old drafter with {LABELS[state]}" if minutes is None else _minutes(minutes)
        cells = [_cell(rows.get((state, minutes))) for rows in by]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(row: Mapping[str, Any]) -> tuple[str, float | None]:
    return row["state"], row["minutes"]


def _minutes(minutes: float) -> str:
    return f"after {minutes:g} minute{'s' if minutes != 1 else ''} of training"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    said = f"{row['tau']:.2f}"
    if "gain" in row:
        said += f" ({row['gain']:+.2f} ± {row['half']:.2f})"
    return said


def fill(text: str, content: str) -> str:
    """``text`` with ``content`` between its two marks, in place of what was there.

    Raises:
        ValueError: it has not both of them, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the document has not the lines {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"

"""The plots of a benchmark's report, as SVG text that names nothing outside itself. Needs
matplotlib.

pytest tests/unit/test_bench_report.py
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from vllm_dflash.evaluation.lengths import break_even_of, lengths_of
from vllm_dflash.evaluation.sweep import BASELINE

_MARKERS = "osD^vP*X<>"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-dflash",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def group_plots(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """One SVG for the rows of a prompt set and temperature: speed over concurrency, tau, acceptance
    by position, time a token."""
    order = [m["name"] for m in results["methods"]]
    by_method = {name: [row for row in rows if row["method"] == name] for name in order}
    styles = _styles(results)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.2), layout="constrained")
        speed, tau, acceptance, latency = figure.subplots(2, 2).flat
        concurrency = sorted({_concurrency(results, row) for row in rows})
        _speed(speed, results, by_method, styles)
        _tau(tau, results, by_method, styles)
        _acceptance(acceptance, results, by_method, styles, concurrency[0])
        _latency(latency, results, by_method, styles)
        for axes in (speed, tau, latency):
            _log2(axes, concurrency, "requests at a time")
        handles, labels = speed.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 6) or 1,
            frameon=False,
        )
        return _svg(figure)


def length_plots(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """One SVG for the rows of a prompt set and temperature over prompt lengths: speed at each load,
    or the tau at which drafting breaks even."""
    with mpl.rc_context(_STYLE):
        if results["settings"].get("break_even"):
            return _svg(_break_even(results, rows))
        return _svg(_over_lengths(results, rows))


def _break_even(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """A plot a method, a line a prompt length."""
    ran = {row["method"] for row in rows}
    names = [m["name"] for m in results["methods"] if m["name"] in ran - {BASELINE}] or [BASELINE]
    figure = Figure(figsize=(5.5 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        own = [row for row in rows if row["method"] == name]
        for i, length in enumerate(lengths_of(results, own)):
            of_length = [row for row in own if _length(results, row) == length]
            label = "prompts as they are" if length is None else f"{length} tokens"
            style = {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)], "label": label}
            _line(axes, results, of_length, [break_even_of(row) for row in of_length], style)
        axes.set_title(f"{name}: drafting pays above this tau")
        _log2(axes, sorted({_concurrency(results, row) for row in own}), "requests at a time")
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return figure


def _over_lengths(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """A plot a load, a line a method."""
    known = [row for row in rows if _length(results, row) is not None]
    loads = sorted({_concurrency(results, row) for row in known})
    figure = Figure(figsize=(max(5.0, 3.6 * len(loads)), 3.6), layout="constrained")
    has_plain = any(row["method"] == BASELINE for row in known)
    all_axes = figure.subplots(1, len(loads), squeeze=False, sharey=has_plain).flat
    for axes, load in zip(all_axes, loads, strict=True):
        for name, style in _styles(results).items():
            own = [
                row for row in known if row["method"] == name and _concurrency(results, row) == load
            ]
            speeds = [_against_plain(row) if has_plain else row["tokens_per_second"] for row in own]
            _line(axes, results, own, speeds, style, x=_length)
        what = f"x {BASELINE}" if has_plain else "tokens/s"
        axes.set_title(f"{what}, {load} at a time")
        _log2(axes, sorted({_length(results, row) for row in known}), "prompt tokens")
        axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _styles(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By method."""
    return {
        m["name"]: {
            "color": f"C{i % 10}",
            "marker": _MARKERS[i % len(_MARKERS)],
            "label": m["name"],
        }
        for i, m in enumerate(results["methods"])
    }


def _log2(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(label)


def _against_plain(row: Mapping[str, Any]) -> Any:
    """Throughput over plain decoding's; None where there is none to compare with."""
    against = row["against"].get(BASELINE)
    if against:
        return against["tokens_per_second"]
    return {"median": 1.0, "low": 1.0, "high": 1.0} if row["method"] == BASELINE else None


def _speed(
    axes: Axes,
    results: Mapping[str, Any],
    by_method: Mapping[str, list[dict[str, Any]]],
    styles: Mapping[str, Any],
) -> None:
    has_plain = bool(by_method.get(BASELINE))
    for name, rows in by_method.items():
        speeds = [_against_plain(row) if has_plain else row["tokens_per_second"] for row in rows]
        _line(axes, results, rows, speeds, styles[name])
    axes.set_title("throughput against plain decoding" if has_plain else "throughput, tokens/s")
    axes.set_ylim(bottom=0)


def _tau(
    axes: Axes,
    results: Mapping[str, Any],
    by_method: Mapping[str, list[dict[str, Any]]],
    styles: Mapping[str, Any],
) -> None:
    for name, rows in by_method.items():
        drafted = [row for row in rows if row["tau"] is not None]
        axes.plot(
            [_concurrency(results, row) for row in drafted],
            [row["tau"] for row in drafted],
            **styles[name],
        )
    axes.set_title("tau: tokens that a verified draft yields")
    axes.set_ylim(bottom=1)


def _acceptance(
    axes: Axes,
    results: Mapping[str, Any],
    by_method: Mapping[str, list[dict[str, Any]]],
    styles: Mapping[str, Any],
    concurrency: int,
) -> None:
    for name, rows in by_method.items():
        for row in rows:
            known = [(i + 1, rate) for i, rate in enumerate(row["acceptance"]) if rate is not None]
            if known and _concurrency(results, row) == concurrency:
                axes.plot(*zip(*known, strict=True), **styles[name])
    axes.set_title(f"accepted at position, once all before were ({concurrency} at a time)")
    axes.set_xlabel("position in the draft")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1)


def _latency(
    axes: Axes,
    results: Mapping[str, Any],
    by_method: Mapping[str, list[dict[str, Any]]],
    styles: Mapping[str, Any],
) -> None:
    for name, rows in by_method.items():
        _line(axes, results, rows, [row["tpot_p50_ms"] for row in rows], styles[name])
        late = [
            (_concurrency(results, row), row["tpot_p95_ms"]["median"])
            for row in rows
            if row["tpot_p95_ms"]
        ]
        if late:
            axes.plot(
                *zip(*late, strict=True), color=styles[name]["color"], linestyle=":", linewidth=1
            )
    axes.set_title("ms per output token: p50, dotted p95")
    axes.set_ylim(bottom=0)


def _line(
    axes: Axes,
    results: Mapping[str, Any],
    rows: list[dict[str, Any]],
    spreads: list[Any],
    style: Mapping[str, Any],
    x: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None,
) -> None:
    """Medians over concurrency, or over ``x`` of results and row, with a bar from the lowest to the
    highest repeat."""
    known = [
        ((x or _concurrency)(results, row), s)
        for row, s in zip(rows, spreads, strict=True)
        if s is not None
    ]
    if not known:
        return
    at, middle = [c for c, _ in known], [s["median"] for _, s in known]
    below, above = (
        [s["median"] - s["low"] for _, s in known],
        [s["high"] - s["median"] for _, s in known],
    )
    axes.errorbar(at, middle, yerr=[below, above], capsize=2, markersize=5, linewidth=1.5, **style)


def _concurrency(results: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    return results["points"][row["point"]]["concurrency"]


def _length(results: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """Tokens of the prompts; None where they are as they are."""
    return results["points"][row["point"]]["prompt_tokens"]


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    # Without these it writes a block of metadata that refers to vocabularies on the web.
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]

"""The report as one HTML file: no script, and nothing that is fetched when it is opened.

pytest tests/unit/test_bench_report.py
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from vllm_dflash.evaluation.lengths import length_groups, length_tables
from vllm_dflash.evaluation.tables import (
    Table,
    acceptance_table,
    facts,
    groups,
    method_table,
    overview_table,
    phase_table,
    speed_table,
)

NO_PLOTS = "no plots, for matplotlib is not installed: pip install 'vllm-dflash[bench]'"

_STYLE = """\
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
ul.facts { color: #4a5568; font-size: 13px; padding-left: 1.1rem; } code { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 9px; border-bottom: 1px solid #e2e8f0; text-align: right; white-space: nowrap; vertical-align: bottom; }
th { border-bottom: 2px solid #cbd5e0; white-space: normal; } td.text, th.text { text-align: left; } td.reason { white-space: normal; }
tr.first td { border-top: 2px solid #cbd5e0; } .bad { color: #b91c1c; font-weight: 600; } svg { max-width: 100%; height: auto; }
p.note { color: #92400e; font-size: 13px; margin: .3rem 0; }
"""
_TEXT_COLUMNS = frozenset({"method", "what it is", "", "reason"})


def page(results: Mapping[str, Any]) -> str:
    """The whole file; where matplotlib is missing it says how to get the plots."""
    body = [
        "<h1>vllm-dflash bench</h1>",
        '<ul class="facts">',
        *(f"<li>{_code(line)}</li>" for line in facts(results)),
        "</ul>",
    ]
    body.append(_table(method_table(results), "h2"))
    try:
        from vllm_dflash.evaluation import plots
    except ImportError:
        plots = None  # type: ignore[assignment]
        body.append(f'<p class="note">{escape(NO_PLOTS)}</p>')
    for (_, rows), over in zip(length_groups(results), length_tables(results), strict=True):
        body.append(_table(over, "h2"))
        if plots is not None:
            body.append(plots.length_plots(results, rows))
    if (overview := overview_table(results)) is not None:
        body.append(_table(overview, "h2"))
    for title, rows in groups(results):
        body.append(f"<h2>{escape(title)}</h2>")
        if plots is not None:
            body.append(plots.group_plots(results, rows))
        body.append(_table(speed_table(results, "Figures", rows), "h3"))
        body += [
            _table(table, "h3")
            for make in (phase_table, acceptance_table)
            if (table := make(results, title, rows)) is not None
        ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>vllm-dflash bench</title><style>{_STYLE}</style>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _marks(name: str, cell: str) -> str:
    is_bad = cell.startswith("NO:") or cell == "did not run"
    return " reason" * (name == "reason") + " bad" * is_bad


def _table(table: Table, heading: str) -> str:
    kinds = ["text" if name in _TEXT_COLUMNS else "" for name in table.header]
    head = "".join(
        f'<th class="{kind}">{escape(name)}</th>'
        for name, kind in zip(table.header, kinds, strict=True)
    )
    lines, before = [], None
    for row in table.rows:
        cells = "".join(
            f'<td class="{kind}{_marks(name, cell)}">{escape(cell)}</td>'
            for cell, kind, name in zip(row, kinds, table.header, strict=True)
        )
        is_first = before not in (None, row[0]) and kinds[0] != "text"
        lines.append(f'<tr class="{"first" if is_first else ""}">{cells}</tr>')
        before = row[0]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f"<{heading}>{escape(table.title)}</{heading}><div"
        f' class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{notes}'
    )


def _code(line: str) -> str:
    """Escaped text, in a code element where the line is in backquotes."""
    return (
        f"<code>{escape(line[1:-1])}</code>"
        if line.startswith("`") and line.endswith("`")
        else escape(line)
    )

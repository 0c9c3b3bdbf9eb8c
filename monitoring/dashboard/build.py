"""Builds the Grafana dashboard from the rows beside it and writes it to
``grafana/dashboards/vllm-dflash.json``, which can be imported as it is.

    pip install -e '.[monitoring]'
    python -m monitoring.dashboard.build            # writes the file
    python -m monitoring.dashboard.build --check    # 1 where the file is not what the code gives

Limits: the schema of grafana-foundation-sdk's version, which is Grafana 12's; newer servers migrate
it when they load it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_options
from grafana_foundation_sdk.models import text as text_options
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.dashboard.drafter import DRAFTER, SWAPPED
from monitoring.dashboard.panel import Note, Panel
from monitoring.dashboard.service import LOAD, REQUESTS, TIME
from monitoring.dashboard.speculation import ACCEPTANCE, DRAFT_LENGTHS, PAYING
from monitoring.queries import DASHBOARD

ROWS = (
    ("Paying?", PAYING),
    ("Acceptance", ACCEPTANCE),
    ("Drafter", DRAFTER),
    ("Time", TIME),
    ("Draft length", DRAFT_LENGTHS),
    ("Requests", REQUESTS),
    ("Load", LOAD),
)
# vLLM's own gauge is there for every engine, with and without drafts, and never expires.
VARIABLES = (
    ("instance", "Server", "label_values(vllm:num_requests_running, instance)"),
    (
        "model",
        "Model",
        'label_values(vllm:num_requests_running{instance=~"$instance"}, model_name)',
    ),
    (
        "engine",
        "Engine",
        (
            'label_values(vllm:num_requests_running{instance=~"$instance",model_name=~"$model"},'
            " engine)"
        ),
    ),
)
DOCS = "/public/vllm-dflash"
"""Where the guide is: compose.yml puts docs/ there. Elsewhere the variable is changed in the
dashboard's settings."""
_GUIDE, _RUNBOOK = "${docs}/dashboard.md", "${docs}/runbook.md"
_SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")
_BUILDERS: dict[str, Any] = {
    "series": timeseries.Panel,
    "number": stat.Panel,
    "bars": bargauge.Panel,
    "heat": heatmap.Panel,
}
_TITLE = "Speculative decoding: does it pay?"
_LEGEND = (
    common.VizLegendOptions()
    .show_legend(True)
    .display_mode(options.LegendDisplayMode.LIST)
    .placement(options.LegendPlacement.BOTTOM)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; end with 1 where the committed file differs",
    )
    check = parser.parse_args(arguments).check
    content = as_json()
    if not check:
        DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
        DASHBOARD.write_text(content)
        print(f"{DASHBOARD}: {sum(len(panels) for _, panels in ROWS)} panels")
    elif not DASHBOARD.exists() or DASHBOARD.read_text() != content:
        print(
            f"{DASHBOARD} is not what the code gives: run python -m monitoring.dashboard.build",
            file=sys.stderr,
        )
        return 1
    return 0


def as_json() -> str:
    """The dashboard in the form that Grafana's import takes."""
    built = json.loads(json.dumps(_dashboard().build(), cls=JSONEncoder))
    for variable in built["templating"]["list"]:
        # The SDK writes what belongs to a variable of kind interval into all; Grafana's schema has
        # it nowhere else.
        for key in ("auto", "auto_min", "auto_count"):
            del variable[key]
    # A dashboard's id is the database's: with none Grafana gives it one.
    return json.dumps({**built, "id": None}, indent=2, ensure_ascii=False) + "\n"


def _dashboard() -> dashboard.Dashboard:
    built = (
        dashboard.Dashboard(_TITLE)
        .uid("vllm-dflash")
        .description(
            "vLLM with block-diffusion speculative decoding (vllm-dflash). Rows from left to right"
            " of the question: does it pay, and if not, why?"
        )
        .tags(["vllm", "speculative-decoding"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(_link("How to read this", _GUIDE))
        .link(_link("Runbook", _RUNBOOK))
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for name, label, query in VARIABLES:
        built.with_variable(
            dashboard.QueryVariable(name)
            .label(label)
            .query({"query": query, "refId": name})
            .datasource(_SOURCE)
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.NATURAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(model.VariableOption(text=["All"], value=["$__all"], selected=True))
        )
    built.annotation(
        dashboard.AnnotationQuery()
        .name("Swaps of the drafter")
        .datasource(_SOURCE)
        .enable(True)
        .icon_color("purple")
        .expr(SWAPPED)
        .step("1m")
        .title_format("another drafter")
        .text_format("{{instance}} {{model_name}} engine {{engine}}")
    )
    built.with_variable(dashboard.ConstantVariable("docs").label("Guide at").value(DOCS))
    for title, panels in ROWS:
        built.with_row(dashboard.Row(title))
        for panel in panels:
            built.with_panel(_note(panel) if isinstance(panel, Note) else _panel(panel))
    return built


def _link(title: str, url: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(title)
        .type(model.DashboardLinkType.LINK)
        .url(url)
        .target_blank(True)
    )


def _note(note: Note) -> text.Panel:
    return (
        text.Panel()
        .mode(text_options.TextMode.MARKDOWN)
        .content(note.text)
        .transparent(True)
        .span(24)
        .height(2)
    )


def _panel(panel: Panel) -> Any:
    built = (
        _BUILDERS[panel.kind]()
        .title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(panel.height)
        .links([_link("How to read it", f"{_GUIDE}#{panel.anchor}")])
    )
    for letter, (expression, legend) in zip("ABCDEFGH", panel.targets):
        built.with_target(_target(panel, letter, expression, legend))
    if panel.minimum is not None:
        built.min(panel.minimum)
    if panel.maximum is not None:
        built.max(panel.maximum)
    if panel.decimals is not None:
        built.decimals(panel.decimals)
    if panel.no_value:
        built.no_value(panel.no_value)
    _SHAPES[panel.kind](built, panel)
    return built


def _target(panel: Panel, letter: str, expression: str, legend: str) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).ref_id(letter).legend_format(legend)
    if panel.kind in ("number", "bars") and not panel.trend:
        return query.instant()
    return query.range().format(
        PromQueryFormat.HEATMAP if panel.kind == "heat" else PromQueryFormat.TIME_SERIES
    )


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    steps = [
        model.Threshold(value=value, color=color)
        for value, color in panel.thresholds or ((None, "green"),)
    ]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _shape_series(built: timeseries.Panel, panel: Panel) -> None:
    built.line_width(2).fill_opacity(60 if panel.stacked else 8).show_points(
        options.VisibilityMode.NEVER
    ).legend(_LEGEND)
    built.tooltip(
        common.VizTooltipOptions()
        .mode(options.TooltipDisplayMode.MULTI)
        .sort(options.SortOrder.DESCENDING)
    )
    if panel.stacked:
        built.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if panel.thresholds:
        built.thresholds(_thresholds(panel)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
        )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)


def _shape_number(built: stat.Panel, panel: Panel) -> None:
    graph = options.BigValueGraphMode.AREA if panel.trend else options.BigValueGraphMode.NONE
    mode = options.BigValueTextMode.NAME if panel.names else options.BigValueTextMode.AUTO
    built.reduce_options(_last()).graph_mode(graph).text_mode(mode).color_mode(
        options.BigValueColorMode.VALUE
    ).thresholds(_thresholds(panel))


def _shape_bars(built: bargauge.Panel, panel: Panel) -> None:
    built.reduce_options(_last()).orientation(options.VizOrientation.HORIZONTAL).thresholds(
        _thresholds(panel)
    )
    built.display_mode(options.BarGaugeDisplayMode.BASIC).value_mode(
        options.BarGaugeValueMode.TEXT
    ).show_unfilled(True)


def _shape_heat(built: heatmap.Panel, panel: Panel) -> None:
    built.color(
        heatmap.HeatmapColorOptions()
        .mode(heatmap_options.HeatmapColorMode.SCHEME)
        .scheme("Blues")
        .steps(64)
    ).calculate(False).y_axis(heatmap.YAxisConfig().unit(panel.bucket_unit).decimals(0)).cell_gap(
        1
    ).show_legend()
    built.cell_values(heatmap.CellValues().unit(panel.unit))


_SHAPES: dict[str, Any] = {
    "series": _shape_series,
    "number": _shape_number,
    "bars": _shape_bars,
    "heat": _shape_heat,
}


if __name__ == "__main__":
    sys.exit(main())

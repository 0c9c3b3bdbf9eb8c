"""The dashboard, the rules and their guides against each other and against the metrics' catalog;
and promtool on the rules.

pytest tests/unit/test_monitoring.py
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import queries
from prometheus import needs_prometheus
from vllm_dflash.metrics.catalog import ALL

DASHBOARD = json.loads(queries.DASHBOARD.read_text())
PANELS = list(queries.panels(DASHBOARD))
ROOT = queries.HERE.parent
ROWS = ["Paying?", "Acceptance", "Time", "Draft length", "Requests", "Load"]
EXPRESSIONS = [target["expr"] for _, panel in PANELS for target in panel["targets"]] + [
    rule["expr"] for path in (queries.RECORDING, queries.ALERTS) for rule in queries.rules(path)
]


def _promtool(*arguments: Any, text: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_committed_dashboard_is_what_the_code_gives() -> None:
    pytest.importorskip(
        "grafana_foundation_sdk",
        reason="needs the extra monitoring: pip install -e '.[monitoring]'",
    )
    from monitoring.dashboard.build import as_json

    assert queries.DASHBOARD.read_text() == as_json(), "run python -m monitoring.dashboard.build"


def test_rows_and_variables() -> None:
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == ROWS
    assert {row for row, _ in PANELS} == set(ROWS)
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "instance",
        "model",
        "engine",
        "docs",
    ]
    assert DASHBOARD["id"] is None


@pytest.mark.parametrize(
    "panel", [panel for _, panel in PANELS], ids=lambda panel: f"{panel['type']}: {panel['title']}"
)
def test_panel(panel: dict[str, Any]) -> None:
    """A unit, a description, a link to a section of the guide that exists, and the variables in
    every query."""
    unit, width = panel["fieldConfig"]["defaults"]["unit"], panel["gridPos"]["w"]
    assert unit
    assert unit != "short", "a figure without its unit"
    assert len(panel["title"]) <= 5.5 * width, "cut off on a screen of 1,366 pixels"
    assert len(panel["description"]) > 20
    assert panel["datasource"]["uid"] == "${datasource}"
    page, _, section = panel["links"][0]["url"].partition("#")
    headings = re.findall(r"^## (.*)$", (ROOT / page.replace("${docs}", "docs")).read_text(), re.M)
    assert section in [
        re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in headings
    ]
    for target in panel["targets"]:
        selectors = re.findall(r"(?:vllm|vllm_dflash)[:_]\w+(\{[^}]*\})?", target["expr"])
        assert selectors, target["expr"]
        assert all(
            'instance=~"$instance",model_name=~"$model",engine=~"$engine"' in selector
            for selector in selectors
        ), target["expr"]


def test_panels_fill_rows_without_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_metric_in_a_query_is_in_the_catalog() -> None:
    known = {
        f"{metric.name}{suffix}"
        for metric in ALL
        for suffix in (["_bucket", "_sum", "_count"] if metric.kind == "histogram" else [""])
    }
    used = set(re.findall(r"(?<!:)\bvllm_dflash_\w+", " ".join(EXPRESSIONS)))
    assert used <= known, used - known


def test_every_metric_is_shown() -> None:
    """But for the gauge of the speed-up, which the two counters that it is made of give over any
    window."""
    shown = " ".join(EXPRESSIONS)
    assert [metric.name for metric in ALL if metric.name not in shown] == [
        "vllm_dflash_estimated_speedup"
    ]


def test_the_drafters_name_is_shown() -> None:
    assert any(
        "{{drafter}}" in target.get("legendFormat", "")
        for _, panel in PANELS
        for target in panel["targets"]
    )


@needs_prometheus
@pytest.mark.parametrize(
    ("drafter", "shown"),
    [("/models/deep/down/d-1", "d-1"), ("org/d-1", "d-1"), ("d-1", "d-1"), ("/a/d-1/", "d-1")],
)
def test_the_drafters_tile_has_the_last_part_of_its_path(
    tmp_path: Path, drafter: str, shown: str
) -> None:
    """A whole local path was unreadable in it."""
    (panel,) = [panel for row, panel in PANELS if (row, panel["title"]) == ("Paying?", "Drafter")]
    values = dict.fromkeys(("instance", "model", "engine"), ".*")
    expression = queries.fill_in(panel["targets"][0]["expr"], values)
    series = 'vllm_dflash_drafter_info{block_size="8", drafter="%s"}'
    case = {
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series % drafter, "values": "1"}],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": "0m",
                        "exp_samples": [{"labels": series % shown, "value": 1}],
                    }
                ],
            }
        ]
    }
    path = tmp_path / "case.yml"
    path.write_text(yaml.safe_dump(case))
    assert "SUCCESS" in _promtool("test", "rules", path)


def test_tiles_fill_their_lines_and_have_room_for_their_titles() -> None:
    """ "Tokens a verification" was cut in a tile of four columns of 24."""
    tiles = [panel for row, panel in PANELS if row == "Paying?" and panel["type"] == "stat"]
    for tile in tiles:
        assert tile["gridPos"]["w"] >= (5 if len(tile["title"]) > 16 else 4), tile["title"]
    lines = {tile["gridPos"]["y"] for tile in tiles}
    assert [
        sum(t["gridPos"]["w"] for t in tiles if t["gridPos"]["y"] == y) for y in sorted(lines)
    ] == [24, 24]


def test_the_context_panel_has_a_sentence_under_it() -> None:
    (note,) = [panel for panel in DASHBOARD["panels"] if panel["type"] == "text"]
    (context,) = [panel for _, panel in PANELS if panel["title"] == "Drafter's context"]
    assert "**Drafter's context**" in note["options"]["content"]
    assert note["gridPos"]["y"] == context["gridPos"]["y"] + context["gridPos"]["h"]


def test_every_division_is_guarded() -> None:
    """An idle server's rates are zero; 0 / 0 is NaN."""
    for expression in EXPRESSIONS:
        for denominator in re.split(r"\s/\s+", expression)[1:]:
            assert re.match(r"(on \(\w*\) (group_left \(\) )?)?\(", denominator), expression
            assert re.search(r"> 0\)", denominator), expression


def test_every_alert_has_a_runbook_entry_and_cases() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    names = [rule["alert"] for rule in queries.rules(queries.ALERTS)]
    assert names == re.findall(r"^## (\w+)$", runbook, re.M)
    cases = [
        case for path in queries.ALERT_CASES for case in yaml.safe_load(path.read_text())["tests"]
    ]
    for rule in queries.rules(queries.ALERTS):
        name = rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        fires = {
            bool(check["exp_alerts"])
            for case in cases
            for check in case["alert_rule_test"]
            if check["alertname"] == name
        }
        assert fires == {True, False}, f"{name}: a firing and a quiet case"
    for title in set(re.findall(r"\*([^*\n]+)\*", runbook)) - {"Status, Targets"}:
        assert title in {panel["title"] for _, panel in PANELS}, (
            f"the runbook names a panel {title!r} that is not there"
        )


def test_provisioning_and_compose_name_files_that_are_there() -> None:
    folder = ROOT / "monitoring"
    services = yaml.safe_load((folder / "compose.yml").read_text())["services"]
    mounts = [
        mount.split(":")
        for service in services.values()
        for mount in service["volumes"]
        if mount.startswith(".")
    ]
    assert all((folder / source).is_dir() for source, *_ in mounts)
    provider = yaml.safe_load(
        (folder / "grafana/provisioning/dashboards/vllm-dflash.yml").read_text()
    )["providers"][0]
    assert provider["options"]["path"] in [target for _, target, *_ in mounts]
    source = yaml.safe_load(
        (folder / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    config = yaml.safe_load(queries.CONFIG.read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert all((queries.CONFIG.parent / name).is_file() for name in config["rule_files"])


@needs_prometheus
def test_configuration_and_rules_are_sound(tmp_path: Path) -> None:
    for path in (queries.CONFIG, queries.RAY_CONFIG):
        assert "SUCCESS" in _promtool("check", "config", path)
    assert "SUCCESS" in _promtool(
        "check", "rules", "--lint=all", "--lint-fatal", queries.RECORDING, queries.ALERTS
    )


@pytest.mark.slow
@needs_prometheus
def test_alerts_fire_and_stay_quiet() -> None:
    """The cases of both files: for every alert one that fires and one that does not, at its own
    threshold."""
    assert "SUCCESS" in _promtool("test", "rules", *queries.ALERT_CASES)

"""Every query of the dashboard and of the rules, as Prometheus takes it: the tests run them all,
and so do the scripts that draw panels.

Standard library and PyYAML only. Limits: knows the variables of this dashboard and no others.

    pytest tests/engine/test_monitoring.py
"""

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
DASHBOARD = HERE / "grafana" / "dashboards" / "vllm-dflash.json"
CONFIG, RAY_CONFIG = HERE / "prometheus" / "prometheus.yml", HERE / "prometheus" / "ray.yml"
RECORDING, ALERTS = HERE / "prometheus" / "recording.yml", HERE / "prometheus" / "alerts.yml"
ALERT_CASES = [HERE / "prometheus" / name for name in ("alerts_test.yml", "alerts_day_test.yml")]
_LABEL_VALUES = re.compile(r"label_values\((?P<selector>.*), *(?P<label>\w+)\)")


@dataclass(frozen=True)
class Query:
    """One expression, and where it comes from: ``place`` is a panel's title or a rule's name,
    ``unit`` is Grafana's (panels only)."""

    place: str
    expression: str
    unit: str = ""
    legend: str = ""


def panels(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each panel that shows data, with the title of the row that it stands in."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        for shown in panel.get("panels", []) if panel["type"] == "row" else [panel]:
            if shown["type"] != "text":
                yield row, shown


def panel_queries(dashboard: Mapping[str, Any], values: Mapping[str, str]) -> list[Query]:
    """The panels' queries; ``values`` gives each variable's value, ``__rate_interval`` and its kind
    included."""
    return [
        Query(
            panel["title"],
            fill_in(target["expr"], values),
            panel["fieldConfig"]["defaults"].get("unit", ""),
            target.get("legendFormat", ""),
        )
        for _, panel in panels(dashboard)
        for target in panel.get("targets", [])
    ]


def variable_queries(
    dashboard: Mapping[str, Any], values: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """(variable, selector of series, label) of each variable that asks Prometheus for the values of
    a label."""
    found = []
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        query = (
            variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
        )
        match = _LABEL_VALUES.fullmatch(fill_in(query, values))
        assert match, f"{variable['name']}: no label_values(...): {query}"
        found.append((variable["name"], match["selector"], match["label"]))
    return found


def rules(path: Path) -> list[dict[str, Any]]:
    """The rules of a file, of all its groups."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def fill_in(expression: str, values: Mapping[str, str]) -> str:
    """Raises ValueError where a variable is left that ``values`` does not have. ``$1`` is none, but
    a group of label_replace's, and stays."""
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), expression)
    if re.search(r"\$(?!\d)", filled):
        raise ValueError(f"no value for a variable of {filled!r}: have {', '.join(values)}")
    return filled


def ask(prometheus: str, path: str, **parameters: str) -> Any:
    """The ``data`` of an answer of Prometheus at the address ``prometheus``.

    Raises:
        ValueError: Prometheus refuses the query; the message is its own.
    """
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{parameters}: {json.load(error).get('error')}") from None

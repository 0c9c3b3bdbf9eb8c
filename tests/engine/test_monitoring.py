"""Every query of the dashboard, the recording rules and the alerts, run by a real Prometheus that
scrapes a real server under traffic.

Limits: the window of a day of one alert is some seconds here, and thresholds are moved so that a
sound server crosses them; whether alerts fire and stay quiet at theirs is promtool's test
(tests/unit/test_monitoring.py).

    pytest -s tests/engine/test_monitoring.py
"""

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.harness import DRAFTER, PROMPTS
from engine.test_serve import request, server
from monitoring import queries
from prometheus import needs_prometheus, scraping

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), needs_prometheus]
K, MAX_TOKENS, REQUESTS, CONCURRENCY = 7, 32, 24, 3
LEAST_TRAFFIC_S = 12
"""The requests come again until so much time has passed: rates need a few scrapes, however fast the
machine is."""
SPECULATIVE = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": K}
VALUES = {"instance": ".*", "model": ".*", "engine": ".*", "__rate_interval": "10s", "docs": ""}
DASHBOARD = json.loads(queries.DASHBOARD.read_text())
LOOSENED = {
    "SpeculationDoesNotPay": {"< 1": "< 1000"},
    "AcceptedLengthLow": {"< 1.3": "< 1000"},
    "AcceptanceBelowProved": {"< 0.8\n": "< 1000\n"},
    "AcceptanceFell": {"offset 1d": "offset 2s", "< 0.7": "< 1000"},
    "DrafterTooSlow": {"> 0.4": "> 0"},
    "EngineBelowPeers": {"0.75 *": "100 *"},
    "NoDrafts": {
        "engine:vllm_dflash_verifications:rate5m > 0\n": (
            "engine:vllm_dflash_verifications:rate5m > 1e9\n"
        ),
        "[5m])) > 0": "[5m])) > 1e9",
    },
    "SpeculationMetricsAbsent": {'up{job="vllm"} == 0': 'up{job="vllm"} == 1'},
}
"""Changes of an alert's expression, with which it gives samples for a sound server."""
MAY_HOLD = {"SpeculationDoesNotPay", "AcceptanceBelowProved"}
"""Two cores may well be slower with speculation; and the drafter was proved on answers of 192
tokens, where this traffic's are short: the beginning of an answer repeats less
(docs/runbook.md)."""
MAY_BE_EMPTY = {
    "Estimated speed-up",
    "Estimated speed-up, by engine",
    "Steps without a draft",
    "Controller",
    "next trial",
}
"""Panels, and legends, that short traffic need not show: the controller may draft in every step, or
measure no plain step."""


@dataclass
class Scraped:
    """What ran: addresses, the times (Unix seconds) before the server, and around the traffic, and
    the clients' own figures."""

    prometheus: str
    port: int
    before: float
    began: float = 0
    ended: float = 0
    idle: float = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def instant(self, expression: str, at: float) -> list[dict[str, Any]]:
        return queries.ask(self.prometheus, "query", query=expression, time=f"{at:.3f}")["result"]

    def over_traffic(self, expression: str) -> list[dict[str, Any]]:
        """The samples of the traffic's time, a second apart, by series."""
        span = {"start": f"{self.began + 2:.3f}", "end": f"{self.ended:.3f}", "step": "1"}
        return queries.ask(self.prometheus, "query_range", query=expression, **span)["result"]

    def total(self, expression: str) -> float:
        """The sum of a counter's series when all was over."""
        return sum(float(series["value"][1]) for series in self.instant(expression, self.idle))


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    flags = [
        "--speculative-config",
        json.dumps(SPECULATIVE),
        "--per-request-spec-decode-metrics",
        "summary",
        "--disable-uvicorn-access-log",
        "--additional-config",
        json.dumps({"dflash": {"adaptive": True}}),
    ]
    with (
        server(*flags) as port,
        scraping(port, tmp_path_factory.mktemp("prometheus")) as prometheus,
    ):
        run = Scraped(prometheus, port, before=time.time() - 3600)
        _wait_for_scrapes(run)
        run.began = time.time()
        texts = [
            json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: REQUESTS // 2]
        ]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            # Each prompt twice: the second finds it in the prefix cache.
            while time.time() < run.began + LEAST_TRAFFIC_S:
                run.answers += pool.map(lambda text: _complete(port, text), texts + texts)
        # Engines write their figures once a second.
        time.sleep(3)
        run.ended = time.time() - 1
        time.sleep(12)
        run.idle = time.time()
        print(f"{len(run.answers)} requests in {run.ended - run.began:.0f} s")
        yield run


def _complete(port: int, text: str) -> dict[str, Any]:
    body = {
        "model": "embedded",
        "prompt": text,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {"dflash": '{"prompt_class": "code"}'},
    }
    return json.loads(request(port, "/v1/completions", body))


def _wait_for_scrapes(run: Scraped) -> None:
    deadline = time.monotonic() + 60
    while not run.instant("vllm_dflash_drafter_info and on () up == 1", time.time()):
        assert time.monotonic() < deadline, "no scrape in a minute"
        time.sleep(0.5)


def _check(place: str, unit: str, series: list[dict[str, Any]]) -> None:
    """Finite, and plausible for the unit: fractions in 0 to 1, seconds below a minute, tau in 1 to
    K + 1, nothing negative."""
    values = [float(value) for one in series for _, value in one["values"]]
    assert all(math.isfinite(value) and value >= 0 for value in values), (place, values)
    if unit == "percentunit":
        assert max(values) <= 1 + 1e-9, (place, values)
    if unit == "s":
        assert 0 < max(values) < 60, (place, values)
    if unit == "tau":
        assert 1 <= min(values) <= max(values) <= K + 1, (place, values)


@pytest.mark.parametrize(
    "query",
    queries.panel_queries(DASHBOARD, VALUES),
    ids=lambda query: f"{query.place}: {query.legend}",
)
def test_panel(scraped: Scraped, query: queries.Query) -> None:
    """Samples over the traffic; and none that is not a number once the server is idle."""
    series = scraped.over_traffic(query.expression)
    names = {query.place, query.legend.rpartition(": ")[2]}
    assert series or names & MAY_BE_EMPTY, f"{query.place} has no sample: {query.expression}"
    if series:
        is_tau = query.legend != "{{le}}" and (
            "Tokens a verification" in query.place or query.place.startswith("By ")
        )
        _check(query.place, "tau" if is_tau else query.unit, series)
    idle = scraped.instant(query.expression, scraped.idle)
    assert all(math.isfinite(float(one["value"][1])) for one in idle), (query.place, idle)


@pytest.mark.parametrize(
    "variable", queries.variable_queries(DASHBOARD, VALUES), ids=lambda variable: variable[0]
)
def test_variable(scraped: Scraped, variable: tuple[str, str, str]) -> None:
    name, selector, label = variable
    values = queries.ask(scraped.prometheus, f"label/{label}/values", **{"match[]": selector})
    assert (
        values
        == {"instance": [f"127.0.0.1:{scraped.port}"], "model": ["embedded"], "engine": ["0"]}[name]
    )


@pytest.mark.parametrize("rule", queries.rules(queries.RECORDING), ids=lambda rule: rule["record"])
def test_recording_rule(scraped: Scraped, rule: dict[str, Any]) -> None:
    """Recorded by Prometheus itself, every second of the traffic."""
    series = scraped.over_traffic(rule["record"])
    assert series or "speedup" in rule["record"], f"{rule['record']} recorded nothing"
    if series:
        unit = (
            "tau"
            if "length" in rule["record"]
            else (
                "percentunit"
                if "acceptance:" in rule["record"] or "share" in rule["record"]
                else ""
            )
        )
        _check(rule["record"], unit, series)


@pytest.mark.parametrize("rule", queries.rules(queries.ALERTS), ids=lambda rule: rule["alert"])
def test_alert(scraped: Scraped, rule: dict[str, Any]) -> None:
    """Quiet for a sound server; with its threshold moved it gives samples of that server."""
    name, expression = rule["alert"], rule["expr"]
    assert name in MAY_HOLD or not scraped.instant(expression, scraped.ended), (
        f"{name} has samples for a sound server"
    )
    for found, put in LOOSENED[name].items():
        assert found in expression, f"{name}: {found!r} is not in it"
        expression = expression.replace(found, put)
    series = scraped.over_traffic(expression)
    assert series or name == "SpeculationDoesNotPay", f"{name}: no sample of {expression}"
    if series:
        _check(name, "", series)


def test_metrics_absent_before_the_server(scraped: Scraped) -> None:
    rule = next(
        rule
        for rule in queries.rules(queries.ALERTS)
        if rule["alert"] == "SpeculationMetricsAbsent"
    )
    assert [one["value"][1] for one in scraped.instant(rule["expr"], scraped.before)] == ["1"]


def test_prometheus_found_no_fault_in_a_rule(scraped: Scraped) -> None:
    groups = queries.ask(scraped.prometheus, "rules")["groups"]
    states = {
        rule["name"]: (rule["health"], rule.get("lastError"))
        for group in groups
        for rule in group["rules"]
    }
    assert len(states) == len(queries.rules(queries.RECORDING)) + len(queries.rules(queries.ALERTS))
    assert set(states.values()) == {("ok", None)}, states


def test_the_clients_count(scraped: Scraped) -> None:
    """Tokens that the clients received, and the acceptance figures of their answers, are what
    Prometheus has."""
    tokens = sum(answer["usage"]["completion_tokens"] for answer in scraped.answers)
    assert tokens == len(scraped.answers) * MAX_TOKENS >= REQUESTS * MAX_TOKENS
    assert (
        scraped.total("vllm_dflash_output_tokens_total")
        == scraped.total("vllm:generation_tokens_total")
        == tokens
    )
    own = [answer["metrics"]["speculative_decoding"] for answer in scraped.answers]
    assert scraped.total("vllm_dflash_accepted_tokens_total") == sum(
        figures["num_accepted_draft_tokens"] for figures in own
    )
    assert scraped.total("vllm_dflash_request_accepted_length_count") == sum(
        figures["num_spec_steps"] > 0 for figures in own
    )


def test_promtool_finds_no_fault_in_our_metrics(scraped: Scraped) -> None:
    """Of ``/metrics``, the families that are ours; vLLM's own break rules of the lint (colons in
    names)."""
    lines = request(scraped.port, "/metrics").splitlines(keepends=True)
    ours = "".join(line for line in lines if re.match(r"(# (HELP|TYPE) )?vllm_dflash_", line))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert ours
    assert done.returncode == 0, done.stdout + done.stderr

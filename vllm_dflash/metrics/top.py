"""``vllm-dflash top URL``: whether speculation pays on a running server, live in a terminal, or
once as JSON for a script.

vllm-dflash top http://127.0.0.1:8000
pytest tests/unit/test_metrics.py tests/engine/test_metrics.py
"""

import argparse
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_dflash.api_keys import headers_of
from vllm_dflash.metrics.figures import Scrape, drafting_line, figures, interval, verdict

NO_ENGINE = (
    "has no vllm_dflash metrics: is the plug-in on (vllm-dflash status), and was the server started"
    ' with --speculative-config \'{"method": "dflash", ...}\'?'
)


def run(args: argparse.Namespace) -> int:
    """Ends with 0, with 1 where the server has no metrics of ours, with 2 where it does not
    answer."""
    url = address(args.url)
    try:
        scrape = fetch(url)
    except (OSError, ValueError) as error:
        print(f"vllm-dflash top: {url} does not answer: {error}", file=sys.stderr)
        return 2
    if not scrape.engines():
        print(f"vllm-dflash top: {url} {NO_ENGINE}", file=sys.stderr)
        return 1
    if args.json:
        print(
            json.dumps(
                {"engines": [each | {"verdict": verdict(each)} for each in figures(scrape)]},
                indent=2,
            )
        )
    elif args.once:
        Console().print(screen(url, scrape))
    else:
        _live(url, scrape, args.interval)
    return 0


def address(url: str) -> str:
    """The address of /metrics of a server that was named by host and port, or whole."""
    url = url if "://" in url else f"http://{url}"
    return url if url.rstrip("/").endswith("/metrics") else url.rstrip("/") + "/metrics"


def fetch(url: str, key: str | None = None) -> Scrape:
    """What the server says; ``key``: its API key, if it asks for one. Raises OSError where nothing
    answers, ValueError where what answers is not Prometheus's text."""
    try:
        request = urllib.request.Request(url, headers=headers_of(key))
        with urllib.request.urlopen(request, timeout=10) as response:
            return Scrape.parse(response.read().decode(), time.monotonic())
    except (
        http.client.HTTPException,
        LookupError,
    ) as error:  # cut short, within a line too, or no HTTP
        raise ValueError(f"its answer is cut short or no metrics ({error!r})") from None


def _live(url: str, scrape: Scrape, interval: float) -> None:
    try:
        with Live(screen(url, scrape), auto_refresh=False, screen=True) as live:
            before: Scrape | None = None
            while True:
                time.sleep(interval)
                try:
                    now = fetch(url)
                except (OSError, ValueError) as error:
                    live.update(Text(f"{url} does not answer: {error}", style="red"), refresh=True)
                    continue
                live.update(screen(url, now, before or scrape), refresh=True)
                before = now
    except KeyboardInterrupt:
        return


def screen(url: str, now: Scrape, before: Scrape | None = None) -> RenderableType:
    """All engines, of the time since ``before`` or since the server began."""
    since = f"last {now.seconds - before.seconds:.0f} s" if before else "since the server began"
    parts: list[RenderableType] = [Text(f"{url}   {since}")]
    if not now.engines():  # the server was started anew, without
        parts.append(Text(f"\nit {NO_ENGINE}", style="red"))
    for found in figures(now, before):
        low, high = interval(found) or (0.0, 2.0)
        style = "bold green" if low >= 1 else "bold red" if high <= 1 else "bold"
        parts += [
            Text(f"\n{found['model']}, engine {found['engine']}: {verdict(found)}", style=style),
            _summary(found),
        ]
        if found["acceptance"]:
            parts.append(_acceptance(found))
    return Group(*parts)


def _summary(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [
        ("drafting", drafting_line(found)),
        (
            "tau",
            f"{_number(found['tau'])} a verification, {_number(found['request_tau'])} by request",
        ),
        ("draft length", _number(found["draft_length"])),
        ("drafter's share", _percent(found["drafter_share"])),
        ("step", _each(found["step_ms"], "{:.1f} ms")),
        ("time", _each(found["time_share"], "{:.0%}")),
        (
            "tokens",
            _each(found["output_tokens"], "{:.0f}")
            + f"; {_number(found['tokens_per_second'])} a second",
        ),
        ("tau by context", _each(found["tau_by_context"], "{:.2f}")),
        ("tau by prompt class", _each(found["tau_by_class"], "{:.2f}")),
        ("missing context", _percent(found["missing_context"])),
        ("controller", _each(found["controller"], "{:.0f}")),
        ("no draft", _each(found["refused"], "{:.0f}")),
        (
            "requests",
            f"{_number(found['running'], 0)} running, {_number(found['waiting'], 0)} waiting",
        ),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _acceptance(found: dict[str, Any]) -> Table:
    """Of each position how many of the draft tokens that were reached were accepted."""
    table = Table(
        title="accepted, given that all before were", title_justify="left", padding=(0, 1)
    )
    for at in found["acceptance"]:
        table.add_column(at, justify="right")
    table.add_row(*(_percent(share) for share in found["acceptance"].values()))
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _each(values: dict[str, float], form: str) -> str:
    return (
        ", ".join(f"{name} {form.format(value)}" for name, value in values.items() if value) or "-"
    )

"""Asks a Prometheus for what each panel of the dashboard shows, and writes it for ``draw.mjs``.

python -m monitoring.ui.collect --prometheus http://127.0.0.1:9090 --minutes 5 --out data.json
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from monitoring import queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", required=True, help="its address")
    parser.add_argument("--minutes", type=float, default=5, help="how far back (default: 5)")
    parser.add_argument(
        "--rate-interval",
        default="15s",
        help="Grafana's $__rate_interval, four scrapes or more (default: 15s)",
    )
    parser.add_argument("--out", type=Path, default=Path("data.json"))
    args = parser.parse_args()
    end = time.time()
    start = end - 60 * args.minutes
    values = {
        "instance": ".*",
        "model": ".*",
        "engine": ".*",
        "docs": "",
        "__rate_interval": args.rate_interval,
    }
    dashboard = json.loads(queries.DASHBOARD.read_text())
    shown = [
        {"row": row, "panel": panel, "series": _series(args.prometheus, panel, values, start, end)}
        for row, panel in queries.panels(dashboard)
    ]
    args.out.write_text(json.dumps({"start": start * 1000, "end": end * 1000, "panels": shown}))
    print(f"{args.out}: {len(shown)} panels, {sum(len(one['series']) for one in shown)} series")


def _series(
    prometheus: str, panel: dict[str, Any], values: dict[str, str], start: float, end: float
) -> list[dict[str, Any]]:
    step = max(1, round((end - start) / 200))
    found = []
    for target in panel["targets"]:
        query = {
            "query": queries.fill_in(target["expr"], values),
            "start": f"{start:.0f}",
            "end": f"{end:.0f}",
            "step": str(step),
        }
        for one in queries.ask(prometheus, "query_range", **query)["result"]:
            name = re.sub(
                r"\{\{(\w+)\}\}",
                lambda label, one=one: one["metric"].get(label[1], ""),
                target["legendFormat"],
            )
            found.append(
                {
                    "name": name,
                    "labels": one["metric"],
                    "points": [[at * 1000, float(value)] for at, value in one["values"]],
                }
            )
    return (
        sorted(found, key=lambda one: (float(one["labels"].get("le", 0)), one["name"]))
        if panel["type"] == "heatmap"
        else found
    )


if __name__ == "__main__":
    main()

"""A real Prometheus (Debian's package) that scrapes a server every second with the configuration and the rules of ``monitoring/``."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from monitoring import queries

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool: apt-get install --no-install-recommends prometheus",
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def scraping(port: int, folder: Path) -> Iterator[str]:
    """Prometheus on ``monitoring/prometheus/prometheus.yml`` with one target, 127.0.0.1:``port``, and seconds for its 15; yields its address."""
    config = yaml.safe_load(queries.CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(queries.CONFIG.with_name(name)) for name in config["rule_files"]]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] == "vllm"]
    jobs[0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    config["scrape_configs"] = jobs
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://{address}", process, folder / "log")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=2).close()
            return
        except (urllib.error.URLError, OSError, json.JSONDecodeError):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "prometheus is not ready after a minute"
            time.sleep(0.2)

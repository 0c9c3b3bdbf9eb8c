"""A real Prometheus (Debian's package) that scrapes a server every second with the configuration
and the rules of ``monitoring/``."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demos.ports import free_port
from monitoring import queries

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool: apt-get install --no-install-recommends prometheus",
)


def scraping(port: int, folder: Path) -> AbstractContextManager[str]:
    """Prometheus on ``monitoring/prometheus/prometheus.yml`` with one target, 127.0.0.1:``port``,
    and seconds for its 15; yields its address."""
    return _prometheus(
        queries.CONFIG, {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}, folder
    )


def scraping_ray(discovery: Path, folder: Path) -> AbstractContextManager[str]:
    """The same on ``monitoring/prometheus/ray.yml``, with the targets that Ray writes into the file
    ``discovery``."""
    return _prometheus(
        queries.RAY_CONFIG,
        {"file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]},
        folder,
    )


@contextmanager
def _prometheus(path: Path, targets: dict[str, Any], folder: Path) -> Iterator[str]:
    config = yaml.safe_load(path.read_text())
    config["global"] = {
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "evaluation_interval": "1s",
    }
    config["rule_files"] = [str(path.with_name(name)) for name in config["rule_files"]]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] == "vllm"]
    jobs[0] |= targets
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

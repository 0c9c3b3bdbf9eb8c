"""``vllm serve`` for the demo: started, asked over HTTP, ended."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dflash.progress import Progress

from . import engines

NAME = "demo"


def command(target: str, speculative: dict[str, Any], port: int, *more: str) -> list[str]:
    """The command line."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        target,
        "--served-model-name",
        NAME,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--speculative-config",
        json.dumps(speculative),
        "--enforce-eager",
        "--max-model-len",
        str(engines.MAX_MODEL_LEN),
        "--kv-cache-memory-bytes",
        str(engines.KV_CACHE_BYTES),
        *more,
    ]


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """The server, from when it is ready to the end of the block."""
    env = {k: v for k, v in os.environ.items() if k not in engines.ENV} | {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            _wait_until_ready(server, port)
            yield
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(server: subprocess.Popen[str], port: int) -> None:
    """Waits for ``/health``; shows a bar, and the server's own words if it ends first."""
    what = "starting the server (imports take most of it)"
    with Progress(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:
        while True:
            try:
                fetch(port, "/health")
                return
            except (urllib.error.URLError, ConnectionError):
                pass
            if server.poll() is not None:
                raise SystemExit(
                    "the server ended with status"
                    f" {server.returncode}:\n{server.stdout.read() if server.stdout else ''}"
                )
            time.sleep(0.5)
            bar.update()


def fetch(port: int, path: str, body: dict[str, Any] | None = None) -> str:
    """One request to the local server; POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


def drafts(port: int) -> tuple[float, float]:
    """Drafts and accepted tokens of all that the server did."""
    metrics = _prometheus(fetch(port, "/metrics"))
    return (
        metrics["vllm:spec_decode_num_drafts_total"],
        metrics["vllm:spec_decode_num_accepted_tokens_total"],
    )


def _prometheus(text: str) -> dict[str, float]:
    """Metric name to the sum over its labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            values[name] = values.get(name, 0.0) + float(line.rpartition(" ")[2])
    return values

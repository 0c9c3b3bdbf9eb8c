"""What is written of a command: no key, password or token, and a key that is sent with each
request."""

import json
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from unit.test_follow_due import flags
from unit.test_follow_watch import page
from vllm_dflash.api_keys import MASK, masked, without_secrets
from vllm_dflash.evaluation import bench
from vllm_dflash.evaluation.methods import Method
from vllm_dflash.follow import refresh
from vllm_dflash.follow.rounds import Rounds
from vllm_dflash.swap import client


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--api-key", "sekret", "--out", "o"], ["--api-key", MASK, "--out", "o"]),
        (["--api-key=sekret"], [f"--api-key={MASK}"]),
        (["--api", "sekret"], ["--api", MASK]),
        (["--a=sekret"], [f"--a={MASK}"]),
        (["--hf-token", "sekret"], ["--hf-token", MASK]),
        (["--password", "sekret"], ["--password", MASK]),
        (["--tokens", "2000"], ["--tokens", "2000"]),
        (["--server", "http://me:sekret@h:1/v1"], ["--server", f"http://{MASK}@h:1/v1"]),
        (["--server", "me:sekret@h:1"], ["--server", f"{MASK}@h:1"]),
        (
            ["--engine-args", '{"hf_token": "sekret", "x": 1}'],
            ["--engine-args", f'{{"hf_token": "{MASK}", "x": 1}}'],
        ),
        (["--note", "hf_sekretsekret"], ["--note", MASK]),
        (["--prompts", "self:100"], ["--prompts", "self:100"]),
        (["--held-out-prompts", "a@b.jsonl"], ["--held-out-prompts", "a@b.jsonl"]),
    ],
)
def test_command_lines(words: list[str], kept: list[str]) -> None:
    assert masked(words) == kept
    assert "sekret" not in " ".join(masked(words))


def test_settings() -> None:
    found = without_secrets(
        {
            "run": {"target": "http://u:sekret@hub/t", "seed": 3, "mask_token": 7},
            "generate": {"engine_args": '{"hf_token": "sekret"}', "api_key": "sekret"},
            "data": {"prompts": ["a.jsonl", "hf_sekretsekret"], "files": None},
        }
    )
    assert "sekret" not in json.dumps(found)
    assert found["run"] == {"target": f"http://{MASK}@hub/t", "seed": 3, "mask_token": 7}
    assert found["data"] == {"prompts": ["a.jsonl", MASK], "files": None}


def test_a_benchmarks_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's command, settings and methods."""
    found: list[dict[str, Any]] = []
    method = Method("server", "server", additional_config={"hf_token": "sekret"})
    plan: Any = Namespace(
        repeats=0, settings={"server": "http://u:sekret@h"}, methods=[method], points=[]
    )
    monkeypatch.setattr(sys, "argv", ["vllm-dflash", "bench", "--server", "http://u:sekret@h"])
    monkeypatch.setattr(bench, "make_plan", lambda args: plan)
    monkeypatch.setattr(bench.Bench, "run", lambda self: found.append(self.results()))
    monkeypatch.setattr(bench, "short_lines", lambda results: [])
    bench.run(Namespace(out=tmp_path / "out"))
    assert "bench --server http://***@h" in " ".join(found[0]["command"])
    assert "sekret" not in json.dumps(found, default=str)


class Guarded:
    """A server that asks for its key everywhere, as behind a proxy."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.url = ""
        self.status = 401


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    found = Guarded()
    metrics = page({4: 500}).encode() + b"\n"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            models = json.dumps(
                {"data": [{"id": "m", "root": str(Path(__file__).parent)}]}
            ).encode()
            raw = metrics if self.path == "/metrics" else models
            good = self.headers.get("Authorization") == "Bearer sekret"
            self.send_response(200 if good else found.status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_key_goes_with_each_request(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The look for the target and that at the metrics."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if by == "variable":
        monkeypatch.setenv("VLLM_API_KEY", "sekret")
    args = flags(server=guarded.url, target=None, api_key="sekret" if by == "flag" else None)
    assert refresh._options(args, (), Rounds(tmp_path)).target == str(Path(__file__).parent)
    assert refresh._scrape(guarded.url, client.key_of(args.api_key)).engines()
    assert guarded.asked == ["/v1/models", "/metrics"]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("key", "said"),
    [(None, "asks for its API key: give it by --api-key"), ("wrong", "refuses the API key that")],
)
def test_a_key_that_is_missing_or_wrong(
    guarded: Guarded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    key: str | None,
    said: str,
) -> None:
    """The key is spoken of, and not the address."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    guarded.status = status
    args = flags(server=guarded.url, target=None, api_key=key)
    with pytest.raises(refresh._UsageError, match=said):
        refresh._options(args, (), Rounds(tmp_path))
    with pytest.raises(client.ServerError, match=said):
        refresh._scrape(guarded.url, key)
    with pytest.raises(client.ServerError, match=said):
        client.which(guarded.url, key)

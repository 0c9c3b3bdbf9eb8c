"""``vllm-dflash swap`` against a server that answers as the endpoint does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from vllm_dflash.cli import main
from vllm_dflash.swap.turns import PATH

FOUND = {
    "id": "0123456789ab",
    "drafter": "/d/new",
    "proved_tau": 3.5,
    "since": 0.0,
    "swaps": 2,
    "refusals": 1,
}


class Endpoint:
    """What it answers, and what it was asked."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] = (200, json.dumps(FOUND).encode())
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.url = ""

    def say(self, status: int, **answer: Any) -> None:
        self.answer = status, json.dumps(answer).encode()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            found.asked.append((self.command, self.path, body, self.headers.get("Authorization")))
            status, raw = found.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


def test_which(endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["swap", "--server", endpoint.url]) == 0
    assert endpoint.asked == [("GET", PATH, None, "Bearer secret")]
    said = capsys.readouterr().out
    assert "drafter 0123456789ab (/d/new, proved tau 3.50), in force for" in said
    assert "2 swaps, 1 refused" in said


def test_swap(endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    endpoint.say(200, **FOUND, before="ba9876543210", context="leave")
    flags = ["--context", "leave", "--api-key", "k"]
    assert main(["swap", "--server", f"{endpoint.url}/v1/", "new", *flags]) == 0
    assert endpoint.asked == [("POST", PATH, {"drafter": "new", "context": "leave"}, "Bearer k")]
    assert "ba9876543210 -> 0123456789ab (/d/new), context: leave" in capsys.readouterr().out


def test_replicas(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """A deployment's answer: they took turns."""
    endpoint.say(200, **FOUND, replicas=3, left=1)
    assert main(["swap", "--server", endpoint.url]) == 0
    assert "; 3 replicas, of which 1 are to take it yet" in capsys.readouterr().out
    endpoint.say(200, **FOUND, replicas=3, left=0, before="ba9876543210", context="recompute")
    assert main(["swap", "--server", endpoint.url, "new"]) == 0
    said = "ba9876543210 -> 0123456789ab on 3 replicas, one after another"
    assert said in capsys.readouterr().out


def test_refused(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Servers after the one that refuses are not asked."""
    endpoint.say(409, refused="the weights hold NaN")
    assert main(["swap", "--server", endpoint.url, "--server", endpoint.url, "new"]) == 1
    assert len(endpoint.asked) == 1
    assert "refused, the old drafter serves on" in (said := capsys.readouterr().err)
    assert "the weights hold NaN" in said


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b'{"detail": "Not Found"}', "has no endpoint for drafters (status 404)"),
        (405, b"", "has no endpoint for drafters"),
        (401, b'{"error": "Unauthorized"}', "asks for its API key"),
        (403, b'{"refused": "an address that others reach"}', "an address that others reach"),
        (503, b'{"refused": "the engine has ended: start"}', "the engine has ended: start"),
        (200, b"{}", "not as vllm-dflash does"),
        (200, b"<html>", "does not answer"),
    ],
)
def test_what_is_no_endpoint(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], status: int, body: bytes, said: str
) -> None:
    endpoint.answer = status, body
    assert main(["swap", "--server", endpoint.url, "new"]) == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_refused(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.say(401, refused="this server asks for its API key")
    assert main(["swap", "--server", endpoint.url, "new", "--api-key", "wrong"]) == 2
    assert "refuses the API key that was given" in capsys.readouterr().err


def test_which_drafter_each_server_has(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one cannot be asked: those before it have the new one, those after it the old."""
    endpoint.say(200, **FOUND, before="ba9876543210", context="leave")
    servers = [endpoint.url, "127.0.0.1:9", "127.0.0.1:10"]
    flags = [word for each in servers for word in ("--server", each)]
    assert main(["swap", *flags, "new"]) == 2
    assert capsys.readouterr().err.split("\n")[-5:] == [
        "the drafter of each server now:",
        f"  {endpoint.url}: 0123456789ab, the new one",
        "  127.0.0.1:9: not known, it could not be asked",
        "  127.0.0.1:10: the one from before, it was not asked",
        "",
    ]


@pytest.mark.parametrize("server", ["http://user:pass@127.0.0.1:9", "user:pass@127.0.0.1:9"])
def test_a_password_in_an_address(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swap", "--server", server, "new"]) == 2
    said = capsys.readouterr().err
    assert "pass@" not in said
    assert "give the key by --api-key" in said


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swap", "--server", "127.0.0.1:9", "new"]) == 2
    assert "does not answer" in capsys.readouterr().err

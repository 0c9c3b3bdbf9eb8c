"""The API key of ``vllm-dflash up``: where it comes from, who is let in, and that it is not in the
configuration."""

import argparse
import asyncio
import json
from typing import Any

import pytest

from vllm_dflash.cluster import command
from vllm_dflash.cluster.access import VARIABLE, Guard, admits, digest_of
from vllm_dflash.cluster.connection import variables
from vllm_dflash.cluster.serve import as_yaml, exposure, serving_of
from vllm_dflash.cluster.settings import ClusterError, EngineSettings

KEY = "sk-a-long-one"


def asked(*headers: tuple[bytes, bytes], **more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": list(headers),
    } | more


def test_the_flag_wins_over_the_variable() -> None:
    assert digest_of(None, {}) is None
    assert (
        digest_of(KEY, {VARIABLE: "another"})
        == digest_of(None, {VARIABLE: KEY})
        != digest_of("another", {})
    )


@pytest.mark.parametrize("key", ["", " ", "two words", "schl\u00fcssel", "line\n"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ClusterError, match="--api-key is empty, or"):
        digest_of(key, {})
    with pytest.raises(ClusterError, match="VLLM_API_KEY is empty, or"):
        digest_of(None, {VARIABLE: key})


def test_who_is_let_in() -> None:
    digest = digest_of(KEY, {}) or ""
    right = (b"authorization", f"Bearer {KEY}".encode())
    assert admits(digest, asked(right))
    assert admits(digest, asked((b"Authorization", f"bearer {KEY}".encode())))
    assert admits(digest, asked(method="OPTIONS"))
    for wrong in (
        b"",
        KEY.encode(),
        b"Bearer",
        b"Bearer ",
        f"Basic {KEY}".encode(),
        f"Bearer {KEY}x".encode(),
        f"Bearer {digest}".encode(),
    ):
        assert not admits(digest, asked((b"authorization", wrong))), wrong
        assert not admits(digest, asked((b"authorization", wrong), right)), wrong
    for path in ("/v1/models", "/tokenize", "/docs", "//v1/completions"):
        assert not admits(digest, asked(path=path)), path
    assert not admits(digest, asked(type="websocket"))


def test_the_guard() -> None:
    """With the key the app is asked, without it never."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send("the app's")

    guard = Guard(app, digest_of(KEY, {}) or "")
    asyncio.run(guard(asked(), None, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 401
    assert "Authorization: Bearer" in json.loads(sent[1]["body"])["error"]["message"]
    sent.clear()
    asyncio.run(guard(asked(type="websocket"), None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    sent.clear()
    for scope in (asked((b"authorization", f"Bearer {KEY}".encode())), {"type": "lifespan"}):
        asyncio.run(guard(scope, None, send))
    assert sent == ["the app's"] * 2


def test_the_configuration_holds_the_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    parser = argparse.ArgumentParser()
    command.add_up_flags(parser)
    serving = serving_of(parser.parse_args(["--target", "org/target", "--host", "0.0.0.0"]))
    assert KEY not in as_yaml(serving)
    assert f"api_key_digest: {digest_of(KEY, {})}" in as_yaml(serving)
    assert exposure(serving) is None
    monkeypatch.delenv(VARIABLE)
    serving = serving_of(parser.parse_args(["--target", "org/target", "--host", "0.0.0.0"]))
    assert "api_key_digest" not in as_yaml(serving)
    assert "asks nobody for a key" in (exposure(serving) or "")
    assert "--api-key" in (exposure(serving) or "")


def test_ray_is_not_given_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's variables go to all nodes by Ray's runtime environment, which Serve's log and
    dashboard show: the key stood there."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    found = variables(EngineSettings("t"))
    assert found["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert KEY not in found.values()

"""The API key of an endpoint: only its digest leaves the command, and the ingress compares with
that. Pure.

pytest tests/unit/test_cluster_access.py
"""

import hashlib
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm_dflash.cluster.settings import ClusterError

VARIABLE = "VLLM_API_KEY"
"""As for ``vllm serve``."""
_Call = Callable[..., Awaitable[None]]
_REFUSAL = {
    "error": {
        "message": "this endpoint asks for its API key: send the header Authorization: Bearer KEY",
        "type": "Unauthorized",
        "param": None,
        "code": 401,
    }
}


def digest_of(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """SHA-256, in hex, of the key that the flag or else ``VARIABLE`` gives; None where neither
    does.

    Raises:
        ClusterError: the key is one that no header carries.
    """
    source, key = ("--api-key", flag) if flag is not None else (VARIABLE, environment.get(VARIABLE))
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise ClusterError(
            f"{source} is empty, or has a space or a letter beyond ASCII: give letters, digits and"
            " signs"
        )
    return key_digest(key)


def key_digest(key: str) -> str:
    """SHA-256, in hex, of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def admits(digest: str, scope: Any) -> bool:
    """Whether an ASGI scope is one to answer: it brings the key, or asks only what a browser may
    send (OPTIONS)."""
    if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
        return True
    given = next(
        (value for name, value in scope["headers"] if name.lower() == b"authorization"), b""
    )
    scheme, _, key = given.partition(b" ")
    return scheme.lower() == b"bearer" and secrets.compare_digest(
        hashlib.sha256(key.strip()).hexdigest(), digest
    )


class Guard:
    """ASGI middleware that lets those with the key through; others get status 401, and a WebSocket
    is closed."""

    def __init__(self, app: _Call, digest: str) -> None:
        self._app, self._digest = app, digest

    async def __call__(self, scope: Any, receive: _Call, send: _Call) -> None:
        """One request, of whatever path."""
        if admits(self._digest, scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps(_REFUSAL).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"www-authenticate", b"Bearer"),
                (b"content-length", str(len(body)).encode()),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

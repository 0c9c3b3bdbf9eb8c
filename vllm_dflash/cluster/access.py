"""The API key of an endpoint: only its digest leaves the command, and the ingress compares with
that. Pure.

pytest tests/unit/test_cluster_access.py
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm_dflash.api_keys import VARIABLE, admits, key_digest
from vllm_dflash.cluster.settings import ClusterError

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

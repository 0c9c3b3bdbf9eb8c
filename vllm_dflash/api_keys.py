"""API keys of an endpoint, and who reaches one that asks for none. Pure.

pytest tests/unit/test_cluster_access.py tests/unit/test_follow_endpoint.py
"""

import hashlib
import ipaddress
import secrets
from typing import Any

VARIABLE = "VLLM_API_KEY"
"""As for ``vllm serve``."""


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

"""API keys of an endpoint, who reaches one that asks for none, and what is written of a command
without its secrets. Pure.

pytest tests/unit/test_cluster_access.py tests/unit/test_follow_secrets.py
"""

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

VARIABLE = "VLLM_API_KEY"
"""As for ``vllm serve``."""
MASK = "***"
"""In the place of a secret."""
_FLAG = re.compile(r"--?[\w-]*(-key|-token|password|secret)", re.IGNORECASE)
_KEY_FLAG = "--api-key"
_NAME = r"[\w-]*(?:key|token|password|secret|authorization)"
_FIELD = re.compile(rf"""(["']{_NAME}["']\s*:\s*)(["']).*?\2""", re.IGNORECASE)
_TEXTS = (
    (re.compile(r"(://)[^/\s]*@"), rf"\1{MASK}@"),  # user:password of an address
    (re.compile(r"(?<![\w/])[^\s:@/'\"]+:[^\s@/:'\"]+@(?=[\w.-])"), f"{MASK}@"),  # without ://
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), MASK),  # the hub's tokens
    (_FIELD, rf"\1\2{MASK}\2"),
)


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


def headers_of(key: str | None) -> dict[str, str]:
    """What a request brings to a server with this key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def refused_key(key: str | None) -> str:
    """Why a server that answers 401 does not serve who has sent this key, or none."""
    if key is None:
        return f"asks for its API key: give it by {_KEY_FLAG} or {VARIABLE}"
    return f"refuses the API key that was given: give its own by {_KEY_FLAG} or {VARIABLE}"


def masked(words: Sequence[str]) -> list[str]:
    """A command line as it may be kept: what follows a flag of a secret is left out, and so is
    ``without_secrets`` of the rest."""
    found: list[str] = []
    is_secret = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if is_secret:
            found.append(MASK)
            is_secret = False
            continue
        # Flags may be shortened.
        of_secret = _FLAG.fullmatch(flag) or (len(flag) > 2 and _KEY_FLAG.startswith(flag))
        found.append(f"{flag}={MASK}" if of_secret and equals else str(without_secrets(word)))
        is_secret = bool(of_secret) and not equals
    return found


def without_secrets(value: Any) -> Any:
    """A value of JSON, or a text, without passwords in addresses, tokens of the hub and what a name
    such as ``api_key`` or ``hf_token`` stands before."""
    if isinstance(value, str):
        for pattern, instead in _TEXTS:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, Mapping):
        return {
            name: MASK
            if isinstance(each, str) and each and re.fullmatch(_NAME, str(name), re.IGNORECASE)
            else without_secrets(each)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value

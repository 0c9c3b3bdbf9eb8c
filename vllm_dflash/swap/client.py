"""A server's endpoint for drafters, asked over HTTP. Standard library only.

pytest tests/unit/test_follow_client.py
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from vllm_dflash.api_keys import VARIABLE, headers_of, refused_key, without_secrets
from vllm_dflash.files import RunError
from vllm_dflash.json_text import loads
from vllm_dflash.swap.turns import PATH

GIVE_ONE = "give the address of a running vLLM server, such as http://127.0.0.1:8000"
_SECONDS = 600.0
"""A large drafter is read from a disk."""


class ServerError(RunError):
    """A server cannot be asked; the message says which, why, and what to do."""


class RefusedError(RunError):
    """A server refuses a drafter; the one from before serves on."""


def key_of(flag: str | None) -> str | None:
    """The server's API key: the flag's, or the variable's."""
    return flag if flag is not None else os.environ.get(VARIABLE) or None


def which(server: str, key: str | None) -> dict[str, Any]:
    """What serves: ``drafter``, ``id``, ``proved_tau``, ``since`` and counts of swaps.

    Raises:
        ServerError, RefusedError: as ``swap``.
    """
    return _ask(server, key, None)


def swap(server: str, key: str | None, drafter: str, context: str) -> dict[str, Any]:
    """Has the server put a drafter in force, and returns what serves then.

    Raises:
        RefusedError: it will not; the message is the server's.
        ServerError: nobody answers there, or without this endpoint, or not with this key.
    """
    return _ask(server, key, {"drafter": drafter, "context": context})


def _ask(server: str, key: str | None, body: dict[str, Any] | None) -> dict[str, Any]:
    url = (server if "://" in server else f"http://{server}").rstrip("/").removesuffix("/v1") + PATH
    headers = {"Content-Type": "application/json", **headers_of(key)}
    shown = without_secrets(server)
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            found = loads(response.read())
    except urllib.error.HTTPError as error:
        raise _refusal(shown, key, error) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerError(
            f"{shown} does not answer ({why_not(server, error)}): {GIVE_ONE}"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise ServerError(f"{shown} answers {PATH}, but not as vllm-dflash does: is it a proxy?")
    return found


def why_not(server: str, error: Exception) -> str:
    """What went wrong with a request, without a password that the server's address holds."""
    if "@" in server:
        return "an address with a user's name and password: give the key by --api-key"
    return str(getattr(error, "reason", error))


def _refusal(server: str, key: str | None, error: urllib.error.HTTPError) -> RunError:
    try:
        said = loads(error.read())["refused"]
    except (ValueError, LookupError, TypeError, OSError):
        said = None
    if error.code == 404 or (said is None and error.code not in (401, 403)):
        return ServerError(
            f"{server} has no endpoint for drafters (status {error.code}): docs/follow.md says how"
            " an administrator turns it on"
        )
    if error.code == 401:
        return ServerError(f"{server} {refused_key(key)}")
    if error.code == 503 and said is not None:  # nobody knows what it serves, if anything
        return ServerError(f"{server}: {said}")
    if error.code == 403:  # not for the key: that is 401, but for what stands before the server
        return ServerError(f"{server}: {said or refused_key(key)}")
    return RefusedError(f"{server}: {said}")

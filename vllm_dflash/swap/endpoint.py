"""The endpoint that says which drafter serves and puts another in its place: off unless it is named
on the server's command line, with the folder that drafters may come from.

    VLLM_DFLASH_SWAP_FROM=/srv/drafters vllm serve TARGET --speculative-config ... --middleware
    vllm_dflash.swap.endpoint.DrafterEndpoint --worker-extension-cls
    vllm_dflash.swap.worker.DrafterSwap

Whoever may ask needs the server's API key. A server that others than this machine reach, and that
asks for none, does not start with it. Middleware stands before vLLM's own check of the key, so the
key is checked here. Requests in flight go on: what they are given is the target's, whatever drafts.

    pytest tests/unit/test_follow_endpoint.py tests/engine/test_swap.py
"""

import asyncio
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_dflash import contents
from vllm_dflash.api_keys import VARIABLE, admits, is_local, key_digest
from vllm_dflash.errors import printable
from vllm_dflash.json_text import loads
from vllm_dflash.log import logger
from vllm_dflash.swap.turns import (
    CONTEXTS,
    PATH,
    RECOMPUTE,
    EngineEndedError,
    Swap,
    count_refusal,
    swap_in,
    which,
)

FROM = "VLLM_DFLASH_SWAP_FROM"
WORKER = "vllm_dflash.swap.worker.DrafterSwap"
_ASKED = "this server asks for its API key: send the header Authorization: Bearer KEY"
NO_JSON = "the body is not said to be JSON: send the header Content-Type: application/json"
_MOST_BYTES = 1 << 16
_MOST_SHOWN = 200
"""Characters of a name in an answer."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class DrafterEndpoint:
    """ASGI middleware for ``vllm serve --middleware``."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app, self._busy = app, asyncio.Lock()
        self.folder = os.environ.get(FROM, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
            return
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path != PATH:
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        digests = keys_of(state.args)
        problem = self.problem(state.args) or foreign(scope, has_key=bool(digests))
        if problem is not None:
            await say(send, HTTPStatus.FORBIDDEN, refused=problem)
        elif digests and not any(admits(digest, scope) for digest in digests):
            await say(send, HTTPStatus.UNAUTHORIZED, refused=_ASKED)
        elif scope["method"] not in ("GET", "POST"):
            await say(send, HTTPStatus.METHOD_NOT_ALLOWED, refused="GET or POST")
        else:
            try:
                await self._answer(scope, state, receive, send)
            except EngineEndedError as error:
                await say(send, HTTPStatus.SERVICE_UNAVAILABLE, refused=str(error))

    async def _answer(self, scope: Scope, state: Any, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await self._swap(scope, state, receive, send)
        else:
            found = await which(state.engine_client)
            await say(send, _status_of(found), **found)

    def problem(self, args: Any) -> str | None:
        """Why a server with these arguments may not have the endpoint; None where it may."""
        if not self.folder:
            return f"{FROM} is not set: give the folder that drafters may be swapped in from"
        if not Path(self.folder).is_dir():
            return f"{FROM} is {self.folder}, which is no folder of this machine"
        if not getattr(args, "worker_extension_cls", ""):
            return f"the workers cannot swap drafters: add --worker-extension-cls {WORKER}"
        local = bool(getattr(args, "uds", None)) or is_local(args.host or "0.0.0.0")
        if not local and not keys_of(args):
            return (
                "the endpoint changes what serves, and this server asks nobody for a key on an"
                f" address that other machines reach: give it one by --api-key or {VARIABLE},"
                " or listen on --host 127.0.0.1"
            )
        return None

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's start: refused where the endpoint may not be there."""
        problem = self.problem(scope["app"].state.args)
        if problem is None:
            logger.warning("drafters can be swapped in from %s by %s", self.folder, PATH)
            await self.app(scope, receive, send)
            return
        logger.error("the server does not start: %s", problem)
        await receive()
        await send({"type": "lifespan.startup.failed", "message": problem})

    async def _swap(self, scope: Scope, state: Any, receive: Receive, send: Send) -> None:
        async def refuse(status: HTTPStatus, why: str) -> None:
            logger.warning("no drafter is swapped in: %s", printable(why))
            await count_refusal(state.engine_client)
            await say(send, status, refused=why)

        if not is_json(scope):
            await refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, NO_JSON)
            return
        try:
            swap = swap_of(await body_of(receive), Path(self.folder))
        except ValueError as error:
            await refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        if self._busy.locked():
            await refuse(HTTPStatus.CONFLICT, "another swap is under way: ask again")
            return
        async with self._busy:
            model = str(state.engine_client.vllm_config.model_config.model)
            target = await asyncio.to_thread(contents.of_folder, model)
            found = await swap_in(state.engine_client, swap, target)
        await say(send, _status_of(found), **found)


def keys_of(args: Any) -> list[str]:
    """Digests of the keys that the server asks for, as vLLM has them: ``--api-key``, or else the
    variable."""
    given = getattr(args, "api_key", None) or [os.environ.get(VARIABLE)]
    return [key_digest(key) for key in given if key]


def swap_of(body: bytes, root: Path) -> Swap:
    """What a request asks for.

    Raises:
        ValueError: it is no swap, or of a folder that is not below ``root``.
    """
    try:
        asked = loads(body)
    except ValueError:
        raise ValueError('the body is no JSON: send {"drafter": "FOLDER"}') from None
    if not isinstance(asked, Mapping) or not isinstance(asked.get("drafter"), str):
        raise ValueError('the body has no drafter: send {"drafter": "FOLDER"}')
    context = asked.get("context", RECOMPUTE)
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}: one of {', '.join(CONTEXTS)}")
    try:
        return Swap(str(_folder_below(root, asked["drafter"])), context)
    except OSError as error:  # a name that is too long, a folder that is not this user's
        said = f"{_short(asked['drafter'])} cannot be read ({error.strerror or error})"
        raise ValueError(f"{said}: give a folder that the server may read") from None


def _folder_below(root: Path, name: str) -> Path:
    """A drafter's folder, all of whose files are below ``root`` too, wherever links lead.

    Raises:
        ValueError: it is not, or one is not.
        OSError: it cannot be looked at.
    """
    top, folder = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    if top not in folder.parents:
        raise ValueError(f"{_short(name)} is not below {root}: put the drafter there")
    if not folder.is_dir():
        raise ValueError(f"{_short(str(folder))} is no folder of the server's machine")
    for file in folder.rglob("*"):
        if top not in Path(os.path.realpath(file)).parents:
            raise ValueError(
                f"{_short(str(file))} leads out of {root}: put the file itself there, not a link"
            )
    return folder


def _short(name: str) -> str:
    return name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."


def foreign(scope: Scope, *, has_key: bool) -> str | None:
    """Why a request may be a web page's and not its user's: browsers send their page's address as
    Origin, and a page whose name leads to this machine sends that as Host, which only a server
    without a key takes for its own. None where it is not."""
    headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
        return "the request is another page's (its Origin is not this server): ask from a program"
    name = urlsplit(f"//{host}").hostname if _is_host(host) else host
    if has_key or not host or is_local(name or "") or _is_address(name or ""):
        return None
    return (
        f"the request is for {_short(host)!r}, and a server without a key answers to localhost"
        " and to addresses alone: ask it by one of them, or give it a key by --api-key or"
        f" {VARIABLE}"
    )


def _is_host(host: str) -> bool:
    try:
        return bool(urlsplit(f"//{host}").hostname)
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_json(scope: Scope) -> bool:
    """Whether a body says that it is JSON, which a page cannot have a browser send unasked."""
    given = next((bytes(v) for n, v in scope["headers"] if n.lower() == b"content-type"), b"")
    return given.partition(b";")[0].strip().lower() == b"application/json"


async def body_of(receive: Receive) -> bytes:
    """A request's body.

    Raises:
        ValueError: it is larger than any that asks for a swap.
    """
    whole = b""
    while True:
        message = await receive()
        whole += message.get("body", b"")
        if len(whole) > _MOST_BYTES:
            raise ValueError(f"the body has more than {_MOST_BYTES} bytes")
        if not message.get("more_body"):
            return whole


def _status_of(found: Mapping[str, Any]) -> HTTPStatus:
    return HTTPStatus.CONFLICT if "refused" in found else HTTPStatus.OK


async def say(send: Send, status: HTTPStatus, **answer: Any) -> None:
    """Answers with an object of JSON."""
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})

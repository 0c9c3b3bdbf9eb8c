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
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm_dflash import contents
from vllm_dflash.api_keys import VARIABLE, admits, is_local, key_digest
from vllm_dflash.json_text import loads
from vllm_dflash.log import logger
from vllm_dflash.swap.turns import CONTEXTS, PATH, RECOMPUTE, Swap, swap_in, which

FROM = "VLLM_DFLASH_SWAP_FROM"
WORKER = "vllm_dflash.swap.worker.DrafterSwap"
_ASKED = "this server asks for its API key: send the header Authorization: Bearer KEY"
_MOST_BYTES = 1 << 16

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
        problem, digests = self.problem(state.args), keys_of(state.args)
        if problem is not None:
            await say(send, HTTPStatus.FORBIDDEN, refused=problem)
        elif digests and not any(admits(digest, scope) for digest in digests):
            await say(send, HTTPStatus.UNAUTHORIZED, refused=_ASKED)
        elif scope["method"] == "GET":
            found = await which(state.engine_client)
            await say(send, _status_of(found), **found)
        elif scope["method"] == "POST":
            await self._swap(state, receive, send)
        else:
            await say(send, HTTPStatus.METHOD_NOT_ALLOWED, refused="GET or POST")

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

    async def _swap(self, state: Any, receive: Receive, send: Send) -> None:
        try:
            swap = swap_of(await body_of(receive), Path(self.folder))
        except ValueError as error:
            await say(send, HTTPStatus.BAD_REQUEST, refused=str(error))
            return
        if self._busy.locked():
            await say(send, HTTPStatus.CONFLICT, refused="another swap is under way: ask again")
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
    folder = Path(os.path.realpath(root / asked["drafter"]))
    if Path(os.path.realpath(root)) not in folder.parents:
        raise ValueError(f"{asked['drafter']} is not below {root}: put the drafter there")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of the server's machine")
    return Swap(str(folder), context)


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

"""Writes what a server is asked and answers, as prompts to train a drafter on: off unless it is
named on the server's command line.

    VLLM_DFLASH_RECORD=traffic vllm serve TARGET --middleware
    vllm_dflash.training.recorder.TrafficRecorder
    vllm-dflash train --target TARGET --prompts traffic/*.jsonl --out RUN

The lines are texts of users: the files are readable by their owner alone, hold no headers or names,
and never more than VLLM_DFLASH_RECORD_MAX_MB (1024) together; then recording ends and serving goes
on, as it does when the disk is full. With VLLM_DFLASH_RECORD_MAX_DAYS no line is kept for longer,
and a full folder loses its oldest file in place of ending the recording. VLLM_DFLASH_RECORD_REDACT
names a function of the user's own, MODULE:FUNCTION, through which each line goes before it is
written. A file's name ends in the digest of the target whose answers it holds. What of it can be
trained on, ``recordable.py`` says. Writing is a thread's work, with a queue that drops lines rather
than wait. Limits: files of a server that has ended are removed by the next one, or by hand.

    pytest tests/unit/test_train_recorder.py tests/engine/test_serve.py
"""

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vllm_dflash.log import logger
from vllm_dflash.training import redaction
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.line_writer import MAX_DAYS, MAX_MB, REDACT, LineWriter, age_of
from vllm_dflash.training.recordable import Serving, answer_text, as_line

FOLDER = "VLLM_DFLASH_RECORD"
_DEFAULT_MAX_MB = 1024
_LARGEST_BODY = 1 << 22
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class TrafficRecorder:
    """ASGI middleware for ``vllm serve --middleware``."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app, self._told, self.problem = app, set[str](), ""
        try:
            self.writer = _writer()
        except (TrainingError, OSError) as error:  # the server's start says it in one line
            self.problem = str(error)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """The server's start, which is refused."""
        logger.error("the server does not start: %s", self.problem)
        await receive()
        await send({"type": "lifespan.startup.failed", "message": self.problem})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.problem and scope["type"] == "lifespan":
            await self._refuse(receive, send)
            return
        path = scope.get("path", "")
        is_recorded = scope["type"] == "http" and path in (_CHAT, _COMPLETION)
        if self.problem or not is_recorded or self.writer.stopped:
            await self.app(scope, receive, send)
            return
        asked, answered = Body(), Body()

        async def hear() -> dict[str, Any]:
            message = await receive()
            asked.add(message.get("body", b""))
            return message

        async def say(message: dict[str, Any]) -> None:
            # The client first: recording must not delay it.
            await send(message)
            if message["type"] == "http.response.start":
                answered.good = message["status"] == 200
            elif message["type"] == "http.response.body":
                answered.add(message.get("body", b""))
                if not message.get("more_body"):
                    self._record(scope, asked, answered)

        await self.app(scope, hear, say)

    def _record(self, scope: Scope, asked: "Body", answered: "Body") -> None:
        if not (asked.good and answered.good):
            return
        chat = scope["path"] == _CHAT
        try:
            serving = Serving.of(scope["app"], chat)
        except (KeyError, AttributeError) as error:
            self._tell_once(f"this vLLM does not say its defaults ({error}): nothing is recorded")
            return
        if why := serving.left_out(chat):
            self._tell_once(why)
        try:
            line = as_line(chat, json.loads(asked.data), answer_text(bytes(answered.data)), serving)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
        ):  # not what vLLM sends; serving is not to suffer
            line = None
        if line is not None:
            self.writer.put(line, getattr(scope["app"].state.args, "model", None))

    def _tell_once(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("%s", why)


def _writer() -> LineWriter:
    """What the environment asks for.

    Raises:
        TrainingError, OSError: it is not there or cannot be; the message says what to give.
    """
    folder, limit = os.environ.get(FOLDER), os.environ.get(MAX_MB, str(_DEFAULT_MAX_MB))
    if not folder:
        raise TrainingError(
            f"{FOLDER} is not set: give the folder to record into, or leave --middleware out"
        )
    if not limit.isdecimal() or limit == "0":
        raise TrainingError(f"{MAX_MB} is {limit!r}: give a whole number of megabytes")
    days, redact = age_of(os.environ.get(MAX_DAYS)), redaction.load(os.environ.get(REDACT))
    writer = LineWriter(Path(folder), int(limit) << 20, days, redact)
    logger.warning(
        "every prompt and answer is recorded in %s, up to %s MB%s%s",
        folder,
        limit,
        "" if days is None else f", for {days:g} days",
        "" if redact is None else f", as {os.environ[REDACT]} leaves it",
    )
    return writer


class Body:
    """A body as it comes in, up to a size that is still recorded."""

    def __init__(self) -> None:
        self.data, self.good = bytearray(), True

    def add(self, part: bytes) -> None:
        if len(self.data) + len(part) > _LARGEST_BODY:
            self.good = False
            self.data.clear()
        elif self.good:
            self.data += part

"""Writes what a server is asked and answers, as prompts to train a drafter on: off unless it is
named on the server's command line.

    VLLM_DFLASH_RECORD=traffic vllm serve TARGET --middleware
    vllm_dflash.training.recorder.TrafficRecorder
    vllm-dflash train --target TARGET --prompts traffic/*.jsonl --out RUN

The lines are texts of users: the files are readable by their owner alone, hold no headers or names,
and never more than
VLLM_DFLASH_RECORD_MAX_MB (1024) together; then recording ends and serving goes on, as it does when
the disk is full. What of it can be trained on, ``recordable.py`` says. Writing is a thread's work,
with a queue that drops lines rather than wait.

    pytest tests/unit/test_train_recorder.py tests/engine/test_serve.py
"""

import json
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_dflash.log import logger
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.recordable import Serving, answer_text, as_line

FOLDER = "VLLM_DFLASH_RECORD"
MAX_MB = "VLLM_DFLASH_RECORD_MAX_MB"
_DEFAULT_MAX_MB = 1024
_LARGEST_BODY = 1 << 22
_WAITING_LINES = 256
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class TrafficRecorder:
    """ASGI middleware for ``vllm serve --middleware``."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        folder, limit = os.environ.get(FOLDER), os.environ.get(MAX_MB, str(_DEFAULT_MAX_MB))
        if not folder:
            raise TrainingError(
                f"{FOLDER} is not set: give the folder to record into, or leave --middleware out"
            )
        if not limit.isdecimal() or limit == "0":
            raise TrainingError(f"{MAX_MB} is {limit!r}: give a whole number of megabytes")
        self.app, self.writer = app, LineWriter(Path(folder), int(limit) << 20)
        self._told: set[str] = set()
        logger.warning("every prompt and answer is recorded in %s, up to %s MB", folder, limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in (_CHAT, _COMPLETION) or self.writer.stopped:
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
            self.writer.put(line)

    def _tell_once(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("%s", why)


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


class LineWriter:
    """Appends lines to a file of this process's own, in a thread, until the folder holds ``limit``
    bytes or the disk is full."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.path, self.limit, self.stopped = (
            folder / f"traffic-{os.getpid()}-{os.urandom(3).hex()}.jsonl",
            limit,
            False,
        )
        self._handle = self._open()
        self._lines: queue.Queue[str] = queue.Queue(_WAITING_LINES)
        threading.Thread(target=self._write, name="traffic recorder", daemon=True).start()

    def _open(self) -> int:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def put(self, line: str) -> None:
        """Hands a line over; it is dropped where the disk is too slow for the traffic."""
        if not self.stopped:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                logger.debug("a line was dropped: the disk is slower than the traffic")

    def drain(self) -> None:
        """Waits until every line that was handed over is dealt with."""
        self._lines.join()

    def _write(self) -> None:
        while True:
            raw = (self._lines.get() + "\n").encode(errors="replace")
            try:
                if not self.stopped:
                    self._append(raw)
            except Exception as error:  # a thread that ends would leave a queue that nobody empties
                self._stop(str(error) or type(error).__name__)
            finally:
                self._lines.task_done()

    def _append(self, raw: bytes) -> None:
        if os.fstat(self._handle).st_nlink == 0:
            # The file has been removed, perhaps with its folder: what is written to it would be on
            # the disk and in no folder.
            os.close(self._handle)
            self._handle = self._open()
        if self._used() + len(raw) > self.limit:
            self._stop(f"{self.path.parent} has reached {MAX_MB}")
            return
        before = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, raw)
            if written < len(raw):
                os.ftruncate(self._handle, before)
                self._stop("the disk is full")
        except OSError as error:
            os.ftruncate(self._handle, before)
            self._stop(error.strerror or "the disk cannot be written")

    def _used(self) -> int:
        """Bytes in the folder, and in this process's own file wherever it has been moved to."""
        own = os.fstat(self._handle)
        used = own.st_size
        for path in self.path.parent.glob("traffic-*.jsonl"):
            with suppress(FileNotFoundError):  # removed meanwhile
                found = path.stat()
                used += (
                    found.st_size if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino) else 0
                )
        return used

    def _stop(self, why: str) -> None:
        self.stopped = True
        logger.warning("recording has ended, serving goes on: %s", why)

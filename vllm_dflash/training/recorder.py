"""Writes what a server is asked and answers, as prompts to train a drafter on: off unless it is named on the server's command line.

    VLLM_DFLASH_RECORD=traffic vllm serve TARGET --middleware vllm_dflash.training.recorder.TrafficRecorder
    vllm-dflash train --target TARGET --prompts traffic/*.jsonl --out RUN

The lines are texts of users: the files are readable by their owner alone, hold no headers or names, and never more than
VLLM_DFLASH_RECORD_MAX_MB (1024) together; then recording ends and serving goes on, as it does when the disk is full. Completions and chats
with one answer in text are written; what cannot be told from the texts again (tools, images, a template of the request's own, reasoning that
the server took out) is not. Writing is a thread's work, with a queue that drops lines rather than wait.

    pytest tests/unit/test_train_recorder.py tests/engine/test_serve.py
"""

import json
import logging
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vllm_dflash.training.files import TrainingError

FOLDER = "VLLM_DFLASH_RECORD"
MAX_MB = "VLLM_DFLASH_RECORD_MAX_MB"
_DEFAULT_MAX_MB = 1024
_LARGEST_BODY = 1 << 22
_WAITING_LINES = 256
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_NOT_IN_THE_TEXT = ("tools", "functions", "chat_template", "chat_template_kwargs", "documents", "echo", "suffix", "continue_final_message")

logger = logging.getLogger("vllm.dflash.recorder")  # vLLM shows its own loggers' children
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class TrafficRecorder:
    """ASGI middleware for ``vllm serve --middleware``."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        folder, limit = os.environ.get(FOLDER), os.environ.get(MAX_MB, str(_DEFAULT_MAX_MB))
        if not folder:
            raise TrainingError(f"{FOLDER} is not set: give the folder to record into, or leave --middleware out")
        if not limit.isdecimal() or limit == "0":
            raise TrainingError(f"{MAX_MB} is {limit!r}: give a whole number of megabytes")
        self.app, self.writer = app, LineWriter(Path(folder), int(limit) << 20)
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
                    self._record(path, asked, answered)

        await self.app(scope, hear, say)

    def _record(self, path: str, asked: "Body", answered: "Body") -> None:
        if not (asked.good and answered.good):
            return
        try:
            line = as_line(path == _CHAT, json.loads(asked.data), answer_text(bytes(answered.data)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # not what vLLM sends; serving is not to suffer
            line = None
        if line is not None:
            self.writer.put(line)


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


def answer_text(body: bytes) -> tuple[str, str] | None:
    """The answer's text and finish reason of a response, streamed or whole; None where it is no single plain text."""
    if body.lstrip().startswith(b"{"):
        events = [json.loads(body)]
    else:
        data = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        if not data or data.pop() != "[DONE]":
            return None  # cut short: the client has gone
        events = [json.loads(line) for line in data]
    text, reason = "", None
    for choice in (choice for event in events for choice in event["choices"]):
        part = choice.get("delta") or choice.get("message") or choice
        if choice["index"] != 0 or any(
            part.get(name) for name in ("tool_calls", "function_call", "reasoning", "reasoning_content", "refusal")
        ):
            return None
        text += part.get("content") or part.get("text") or ""
        reason = choice.get("finish_reason") or reason
    return (text, reason) if text and reason in ("stop", "length") else None


def as_line(chat: bool, request: dict[str, Any], answer: tuple[str, str] | None) -> str | None:
    """A line as ``vllm-dflash train`` reads it; None where the prompt could not be told from it again."""
    if answer is None or any(request.get(name) for name in _NOT_IN_THE_TEXT) or (request.get("n") or 1) > 1 or request.get("stop"):
        return None
    prompt = request["messages" if chat else "prompt"]
    if chat:
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
            return None
        asked: dict[str, Any] = {"messages": [{"role": m["role"], "content": m["content"]} for m in prompt]}
    elif isinstance(prompt, str):
        asked = {"prompt": prompt}
    elif prompt and all(isinstance(i, int) for i in prompt):
        asked = {"prompt_token_ids": prompt}
    else:
        return None
    return json.dumps(asked | {"response": answer[0], "finish_reason": answer[1]}, ensure_ascii=False)


class LineWriter:
    """Appends lines to a file of this process's own, in a thread, until the folder holds ``limit`` bytes or the disk is full."""

    def __init__(self, folder: Path, limit: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self.limit, self.stopped = folder / f"traffic-{os.getpid()}-{os.urandom(3).hex()}.jsonl", limit, False
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._lines: queue.Queue[str] = queue.Queue(_WAITING_LINES)
        threading.Thread(target=self._write, name="traffic recorder", daemon=True).start()

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
            if not self.stopped:
                self._append(raw)
            self._lines.task_done()

    def _append(self, raw: bytes) -> None:
        if sum(p.stat().st_size for p in self.path.parent.glob("traffic-*.jsonl")) + len(raw) > self.limit:
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

    def _stop(self, why: str) -> None:
        self.stopped = True
        logger.warning("recording has ended, serving goes on: %s", why)

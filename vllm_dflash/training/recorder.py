"""Writes what a server is asked and answers, as prompts to train a drafter on: off unless it is
named on the server's command line.

    VLLM_DFLASH_RECORD=traffic vllm serve TARGET --middleware
    vllm_dflash.training.recorder.TrafficRecorder
    vllm-dflash train --target TARGET --prompts traffic/*.jsonl --out RUN

The lines are texts of users: the files are readable by their owner alone, hold no headers or names,
and never more than
VLLM_DFLASH_RECORD_MAX_MB (1024) together; then recording ends and serving goes on, as it does when
the disk is full. Completions and chats with one answer in text are written; what cannot be told
from the texts again (tools, images, a template of the request's own, reasoning that the server took
out) is not, nor what the target would not have said by itself (structured outputs, biases, bans,
penalties, a prompt that was
cut): a request that sets a field which is not known to leave the answer alone is left out. Writing
is a thread's work, with a queue that
drops lines rather than wait.

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

FOLDER = "VLLM_DFLASH_RECORD"
MAX_MB = "VLLM_DFLASH_RECORD_MAX_MB"
_DEFAULT_MAX_MB = 1024
_LARGEST_BODY = 1 << 22
_WAITING_LINES = 256
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_HARMLESS = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stream",
        "stream_options",
        "stream_interval",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_token_offsets",
        "return_prompt_text",
        "user",
        "metadata",
        "store",
        "request_id",
        "session_id",
        "priority",
        "cache_salt",
        "service_tier",
    }
)
"""Fields of a request that leave the answer to the target, whatever they hold. Others may be left
out, or as in ``_NEUTRAL``."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "echo": (False,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "vllm_xargs": ({},),
}
"""What other fields may hold: values that vLLM takes for nothing."""

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
    """The answer's text and finish reason of a response, streamed or whole; None where it is no
    single plain text."""
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
            part.get(name)
            for name in ("tool_calls", "function_call", "reasoning", "reasoning_content", "refusal")
        ):
            return None
        text += part.get("content") or part.get("text") or ""
        reason = choice.get("finish_reason") or reason
    return (text, reason) if text and reason in ("stop", "length") else None


def as_line(chat: bool, request: dict[str, Any], answer: tuple[str, str] | None) -> str | None:
    """A line as ``vllm-dflash train`` reads it; None where the prompt could not be told from it
    again."""
    if answer is None or not all(_leaves_alone(name, value) for name, value in request.items()):
        return None
    prompt = request["messages" if chat else "prompt"]
    if chat:
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
            return None
        asked: dict[str, Any] = {
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompt]
        }
    elif isinstance(prompt, str):
        asked = {"prompt": prompt}
    elif prompt and all(isinstance(i, int) for i in prompt):
        asked = {"prompt_token_ids": prompt}
    else:
        return None
    return json.dumps(
        asked | {"response": answer[0], "finish_reason": answer[1]}, ensure_ascii=False
    )


def _leaves_alone(name: str, value: Any) -> bool:
    """Whether a request's field leaves prompt and answer to the target."""
    return name in _HARMLESS or value is None or value in _NEUTRAL.get(name, ())


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

"""The recorder over ASGI, with bodies in vLLM's shape: what it writes is what training reads, and
nothing of it disturbs the client."""

import asyncio
import inspect
import json
import os
import resource
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training_runs import in_child
from vllm_dflash.training import recordable, recorder
from vllm_dflash.training.recorder import FOLDER, MAX_MB, TrafficRecorder

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
WHOLE = {
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    ]
}


def stream(*texts: str, done: bool = True) -> bytes:
    events = [
        {"choices": [{"index": 0, "delta": {"content": t}, "finish_reason": None}]} for t in texts
    ]
    events[-1]["choices"][0]["finish_reason"] = "length"
    lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, {"choices": [], "usage": {}}]]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


class Server:
    """An ASGI application that reads the request and sends a fixed body in three parts."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.body, self.heard = status, b"", b""
        # What vLLM keeps in its application's state; "m" and what has no name is the target.
        self.defaults: dict[str, Any] = {}
        self.args = SimpleNamespace(chat_template=None)
        handler = SimpleNamespace(default_sampling_params=self.defaults)
        self.state = SimpleNamespace(
            openai_serving_chat=handler,
            openai_serving_completion=handler,
            openai_serving_models=SimpleNamespace(is_base_model=lambda name: name == "m"),
            args=self.args,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.heard = (await receive())["body"]
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        third = len(self.body) // 3 + 1
        for at in range(0, len(self.body), third):
            await send(
                {
                    "type": "http.response.body",
                    "body": self.body[at : at + third],
                    "more_body": at + third < len(self.body),
                }
            )


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "traffic"))
    monkeypatch.setenv(MAX_MB, "1")
    app = Server()
    return app, TrafficRecorder(app)


def ask(
    served, request: Any, answer: Any, path: str = "/v1/chat/completions", status: int = 200
) -> None:
    """One request; the client gets the very bytes, the application too."""
    app, middleware = served
    app.status, app.body = (
        status,
        (answer if isinstance(answer, bytes) else json.dumps(answer).encode()),
    )
    raw, got = json.dumps(request).encode(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        got.append(message.get("body", b""))

    asyncio.run(middleware({"type": "http", "path": path, "app": app}, receive, send))
    assert (b"".join(got), app.heard) == (app.body, raw)
    middleware.writer.drain()


def recorded(served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served[1].writer.path.read_text().split("\n") if line]


def test_what_is_recorded(served) -> None:
    ask(served, CHAT, WHOLE)
    ask(served, CHAT | {"stream": True}, stream("hel", "lo ", "\u00fc"))
    ask(
        served,
        {"prompt": "a", "max_tokens": 3},
        {"choices": [{"index": 0, "text": "bc", "finish_reason": "length"}]},
        "/v1/completions",
    )
    ask(
        served,
        {"prompt": [5, 6]},
        {"choices": [{"index": 0, "text": "bc", "finish_reason": "stop"}]},
        "/v1/completions",
    )
    assert recorded(served) == [
        CHAT | {"response": "hello", "finish_reason": "stop"},
        CHAT | {"response": "hello \u00fc", "finish_reason": "length"},
        {"prompt": "a", "response": "bc", "finish_reason": "length"},
        {"prompt_token_ids": [5, 6], "response": "bc", "finish_reason": "stop"},
    ]
    assert stat.S_IMODE(served[1].writer.path.stat().st_mode) == 0o600


def test_what_is_not(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, other endpoints, several answers, tools, images, answers that were cut short or
    rewritten by the server."""
    ask(served, CHAT, WHOLE, status=400)
    ask(served, CHAT, WHOLE, path="/v1/embeddings")
    for more in ({"n": 2}, {"tools": [{}]}, {"chat_template": "x"}, {"stop": ["\n"]}):
        ask(served, CHAT | more, WHOLE)
    ask(served, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, WHOLE)
    ask(
        served,
        CHAT,
        {
            "choices": [
                {
                    "index": 0,
                    "message": {"content": "4", "reasoning": "2 + 2"},
                    "finish_reason": "stop",
                }
            ]
        },
    )
    ask(served, CHAT, stream("hel", done=False))
    ask(served, CHAT, b"no JSON")
    ask(served, [1], WHOLE)
    monkeypatch.setattr(recorder, "_LARGEST_BODY", 50)
    ask(served, CHAT, WHOLE)
    assert recorded(served) == []


CONSTRAINTS = {
    "structured_outputs": {"choice": ["yes"]},
    "response_format": {"type": "json_object"},
    "guided_json": {},
    "logit_bias": {"5": 1},
    "bad_words": ["no"],
    "stop_token_ids": [5],
    "allowed_token_ids": [5],
    "min_tokens": 5,
    "truncate_prompt_tokens": 8,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "thinking_token_budget": 9,
    "include_reasoning": False,
    "ignore_eos": True,
    "vllm_xargs": {"x": 1},
    "skip_special_tokens": False,
    "a_field_of_a_later_vllm": 1,
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_what_the_target_would_not_have_said(served, name: str) -> None:
    """Answers under structured outputs, biases and bans, and to prompts that were cut, were once
    kept to be trained on."""
    ask(served, CHAT | {name: CONSTRAINTS[name]}, WHOLE)
    assert recorded(served) == []


MORE = {
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    "reasoning_content": "2 + 2",
    "reasoning": "2 + 2",
    "name": "Ann",
    "tool_call_id": "1",
    "a_key_of_a_later_vllm": "x",
}


@pytest.mark.parametrize("name", MORE)
def test_a_message_with_more_than_role_and_content(served, name: str) -> None:
    """A template writes of it, and the recorded prompt had it taken off: the answer to another
    prompt. Null is nothing to vLLM."""
    said = {"role": "assistant", "content": "so"}
    for value in (MORE[name], None):
        ask(served, {"messages": [*CHAT["messages"], said | {name: value}]}, WHOLE)
    assert [line["messages"] for line in recorded(served)] == [[*CHAT["messages"], said]]


def test_no_prompt(served) -> None:
    """These lines once ended ``vllm-dflash train``, which refuses them; and true is no token."""
    text = {"choices": [{"index": 0, "text": "bc", "finish_reason": "stop"}]}
    ask(served, {"messages": []}, WHOLE)
    for prompt in ("", [], [True, False]):
        ask(served, {"prompt": prompt}, text, "/v1/completions")
    assert recorded(served) == []


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r\n"])
def test_line_ends_of_other_alphabets_are_text(served, mark: str) -> None:
    """vLLM streams U+2028 as it is, and a line of the stream was cut at it."""
    text = f"one{mark}two"
    raw = stream(text).decode()
    for escape, char in (("\\u2028", "\u2028"), ("\\u2029", "\u2029"), ("\\u0085", "\x85")):
        raw = raw.replace(escape, char)
    ask(served, CHAT | {"stream": True}, raw.encode())
    ask(served, CHAT | {"stream": True}, raw.replace("\n", "\r\n").encode())
    assert [line["response"] for line in recorded(served)] == [text] * 2


DEFAULTS = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "stop_token_ids": [5],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_servers_defaults(served, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """generation_config.json and --override-generation-config set sampling parameters that no
    request shows; a request's own value wins, but for stop tokens, which vLLM joins."""
    served[0].defaults |= {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    ask(served, CHAT, WHOLE)
    served[0].defaults[name] = DEFAULTS[name]
    ask(served, CHAT, WHOLE)
    ask(served, CHAT, WHOLE)
    assert len(recorded(served)) == 1
    assert caplog.text.count(f"the server's default is {name}=") == 1
    ask(served, CHAT | {name: recordable._NEUTRAL[name][0]}, WHOLE)
    assert len(recorded(served)) == (1 if name == "stop_token_ids" else 2)


def test_what_is_not_the_targets_own(served, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter's answers, chats through --chat-template, and a vLLM that does not say."""
    text = {"choices": [{"index": 0, "text": "bc", "finish_reason": "stop"}]}
    ask(served, CHAT | {"model": "adapter"}, WHOLE)
    served[0].args.chat_template = "{{ messages }}"
    ask(served, CHAT | {"model": "m"}, WHOLE)
    assert recorded(served) == []
    assert "--chat-template is not the target's own template" in caplog.text
    ask(served, {"prompt": "a", "model": "m"}, text, "/v1/completions")
    assert len(recorded(served)) == 1
    del served[0].state.openai_serving_models
    ask(served, {"prompt": "a"}, text, "/v1/completions")
    assert len(recorded(served)) == 1
    assert "nothing is recorded" in caplog.text


def test_fields_that_change_nothing_are_no_reason(served) -> None:
    plain = {
        "model": "m",
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 1,
        "stop": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tools": [],
    }
    ask(
        served,
        CHAT
        | plain
        | {
            "repetition_penalty": 1.0,
            "response_format": {"type": "text"},
            "max_tokens": 9,
            "user": "u",
        },
        WHOLE,
    )
    assert len(recorded(served)) == 1


@pytest.mark.vllm
def test_every_field_of_vllm_is_judged() -> None:
    """Each that vLLM's requests have, at its default, leaves a request to be recorded; so the list
    does not fall behind in silence."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind, needed in ((ChatCompletionRequest, CHAT), (CompletionRequest, {"prompt": "a"})):
        request = kind(**needed).model_dump()
        kept = {
            name: value
            for name, value in request.items()
            if not recordable._leaves_alone(name, value)
        }
        assert kept.keys() <= {"add_special_tokens", "mm_payload", "routed_experts_prompt_start"}, (
            kept
        )


@pytest.mark.vllm
def test_what_a_server_adds_is_where_vllm_keeps_it(tmp_path: Path, monkeypatch) -> None:
    """The names in vLLM's sources, and Starlette's own application in the scope."""
    pytest.importorskip("vllm")
    from fastapi import FastAPI, Request
    from vllm.entrypoints.generate import api_router
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.openai.chat_completion import serving as chats
    from vllm.entrypoints.openai.completion import serving as completions
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    source = inspect.getsource
    assert "state.openai_serving_chat = " in source(api_router)
    assert "state.openai_serving_completion = " in source(api_router)
    assert "state.args = args" in source(app_state)
    assert "state.openai_serving_models = " in source(app_state)
    for module in (chats, completions):
        assert "self.default_sampling_params = " in source(module)
    assert callable(OpenAIServingModels.is_base_model)

    monkeypatch.setenv(FOLDER, str(tmp_path / "traffic"))
    app, found = FastAPI(), []
    app.add_middleware(TrafficRecorder)
    monkeypatch.setattr(TrafficRecorder, "_record", lambda self, scope, *_: found.append(scope))

    @app.post("/v1/completions")
    async def answer(request: Request) -> dict[str, Any]:
        return await request.json()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(app({**scope, "query_string": b""}, receive, send))
    assert [each["app"] for each in found] == [app]


def test_a_file_that_vanishes_meanwhile(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the glob and its stat: that ended the writing thread, and ``stopped`` stayed
    false."""
    folder = served[1].writer.path.parent
    found = Path.glob

    def glob(self: Path, pattern: str):
        yield folder / "traffic-gone.jsonl"
        yield from found(self, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    ask(served, CHAT, WHOLE)
    assert len(recorded(served)) == 1


def test_a_writer_that_fails_says_so(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it fails with, recording has ended, the queue is emptied, and requests are
    answered."""
    monkeypatch.setattr(served[1].writer, "_append", lambda raw: 1 / 0)
    for _ in range(3):
        ask(served, CHAT, WHOLE)
    assert served[1].writer.stopped


def test_the_folder_is_deleted(served) -> None:
    """The lines went on into a file without a name, ten megabytes past a limit of one. A new file
    is begun, and the limit holds."""
    ask(served, CHAT, WHOLE)
    shutil.rmtree(served[1].writer.path.parent)
    for _ in range(12):
        ask(
            served,
            CHAT,
            {
                "choices": [
                    {"index": 0, "message": {"content": "y" * 100_000}, "finish_reason": "stop"}
                ]
            },
        )
    assert 5 < len(recorded(served)) < 12
    assert served[1].writer.stopped
    assert sum(p.stat().st_size for p in served[1].writer.path.parent.iterdir()) <= 1 << 20


def test_the_file_is_moved_away(served) -> None:
    """What it holds still counts."""
    path = served[1].writer.path
    path.rename(path.parent.with_name("elsewhere"))
    for _ in range(12):
        ask(
            served,
            CHAT,
            {
                "choices": [
                    {"index": 0, "message": {"content": "y" * 100_000}, "finish_reason": "stop"}
                ]
            },
        )
    assert path.parent.with_name("elsewhere").stat().st_size <= 1 << 20


def test_the_bound(served) -> None:
    """A megabyte for the folder, whatever its files: the line that would pass it ends the
    recording, and requests are still answered."""
    (served[1].writer.path.parent / "traffic-of-another-process.jsonl").write_bytes(b"x" * 900_000)
    for _ in range(4):
        ask(
            served,
            CHAT,
            {
                "choices": [
                    {"index": 0, "message": {"content": "y" * 100_000}, "finish_reason": "stop"}
                ]
            },
        )
    assert len(recorded(served)) == 1
    assert served[1].writer.stopped
    assert sum(p.stat().st_size for p in served[1].writer.path.parent.iterdir()) <= 1 << 20


def test_a_full_disk(served) -> None:
    """No half line is left, and no request fails."""

    def child() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        app = Server()
        recording = (app, TrafficRecorder(app))
        for _ in range(20):
            ask(recording, CHAT, WHOLE)
        assert recording[1].writer.stopped
        return json.dumps(recorded(recording))

    lines = json.loads(in_child(child))
    assert 0 < len(lines) < 20
    assert all(line["response"] == "hello" for line in lines)


def assert_no_start(why: str) -> None:
    """The server does not start, and says so in one line, not by a traceback."""
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    asyncio.run(TrafficRecorder(Server())({"type": "lifespan"}, receive, send))
    (message,) = said
    assert message["type"] == "lifespan.startup.failed"
    assert why in message["message"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert_no_start("VLLM_DFLASH_RECORD is not set")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(MAX_MB, "lots")
    assert_no_start("give a whole number of megabytes")
    monkeypatch.setenv(MAX_MB, "1")
    monkeypatch.setenv("VLLM_DFLASH_RECORD_REDACT", "no_such_module:hide")
    assert_no_start("give MODULE:FUNCTION")
    monkeypatch.delenv("VLLM_DFLASH_RECORD_REDACT")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    assert_no_start("exists")
    assert os.listdir(tmp_path) == ["file"]

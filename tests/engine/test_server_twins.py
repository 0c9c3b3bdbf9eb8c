"""A server with drafts and one without, asked the same over HTTP; and how one with drafts ends when
a part of it is killed.

The drafter comes as a folder in speculators' format that names its target: ``vllm serve FOLDER``,
no flag. Both servers share one ``PROMETHEUS_MULTIPROC_DIR``.

    pytest -s tests/engine/test_server_twins.py
"""

import http.client
import json
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.feature_server import wait_until_idle
from engine.harness import DRAFTER, PROMPTS, TARGET, wait_until_gone
from engine.test_serve import metric, request, server
from vllm_dflash.tools.convert import convert

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
TEXTS = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:4]]
FLAGS = (
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "pythonic",
    "--enable-prompt-tokens-details",
    "--reasoning-parser",
    "granite",
    # This parser takes all for reasoning until it ends, and vLLM's grammars, tools' too, begin only
    # then.
    "--structured-outputs-config",
    json.dumps({"enable_in_reasoning": True}),
)
DRAIN = ("--shutdown-timeout", "60")
"""On SIGTERM requests that run may go on for so many seconds; without it vLLM ends them at once."""
GREEDY: dict[str, Any] = {"model": "embedded", "temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"kind": {"enum": ["class", "module"]}, "private": {"type": "boolean"}},
    "required": ["kind", "private"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "define", "description": "Defines a name.", "parameters": PARAMETERS},
    }
]
CONVERSATION = [
    {"role": "system", "content": "import json"},
    {"role": "user", "content": "import os"},
    {"role": "assistant", "content": "import sys"},
    {"role": "user", "content": TEXTS[0]},
]
THOUGHT = r"Here is my thought process: [a-z ]{8,16}\. Here is my response: [a-z ]{4,12}\."
"""What the reasoning parser takes apart; the pair would not write it of itself."""
NOT_COMPARED = {
    "id",
    "created",
    "created_at",
    "completed_at",
    "item_id",
    "call_id",
    "request_id",
    "response_id",
    "system_fingerprint",
}
"""What differs between any two answers: names and times, and a digest of the server's
configuration."""


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": user(TEXTS[0]), "max_tokens": 48}),
    "conversation": (CHAT, {"messages": CONVERSATION, "max_tokens": 48}),
    "n and logprobs": (
        CHAT,
        {
            "messages": user(TEXTS[1]),
            "max_tokens": 24,
            "n": 2,
            "temperature": 0.8,
            "seed": 7,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    "a named tool": (
        CHAT,
        {
            "messages": user(TEXTS[2]),
            "max_tokens": 64,
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "define"}},
        },
    ),
    "a required tool": (
        CHAT,
        {"messages": user(TEXTS[3]), "max_tokens": 96, "tools": TOOLS, "tool_choice": "required"},
    ),
    "tools, as it likes": (
        CHAT,
        {"messages": user(TEXTS[0]), "max_tokens": 32, "tools": TOOLS, "tool_choice": "auto"},
    ),
    "reasoning": (
        CHAT,
        {"messages": user(TEXTS[0]), "max_tokens": 64, "structured_outputs": {"regex": THOUGHT}},
    ),
    "completion": (
        COMPLETION,
        {"prompt": TEXTS[1], "max_tokens": 40, "stop": ["return"], "logprobs": 2, "echo": True},
    ),
    "response": (RESPONSE, {"input": TEXTS[2], "max_output_tokens": 40}),
    "response to a conversation": (
        RESPONSE,
        {"instructions": "import os", "input": user(TEXTS[3]), "max_output_tokens": 40},
    ),
}


@dataclass
class Twins:
    plain: int
    """The port of the server without a drafter."""
    drafted: int


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter") / "speculators"
    convert(DRAFTER, folder, "speculators", verifier=str(TARGET))
    return folder


@contextmanager
def drafted(drafter: Path, *flags: str, **more: Any) -> Iterator[int]:
    adaptive = json.dumps({"dflash": {"adaptive": False}})
    own = ("--tokenizer", str(TARGET), "--additional-config", adaptive)
    with server(*FLAGS, *own, *flags, model=drafter, **more) as port:
        yield port


@pytest.fixture(scope="module")
def twins(drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics")),
    }
    with server(*FLAGS, *DRAIN, env=env) as plain, drafted(drafter, *DRAIN, env=env) as ours:
        yield Twins(plain, ours)


def bare(answer: Any) -> Any:
    """An answer without what differs between any two."""
    if isinstance(answer, dict):
        return {key: bare(value) for key, value in answer.items() if key not in NOT_COMPARED}
    if isinstance(answer, list):
        return [bare(value) for value in answer]
    return round(answer, 2) if isinstance(answer, float) else answer


def ask(port: int, name: str, **more: Any) -> Any:
    path, body = ASKS[name]
    return bare(json.loads(request(port, path, GREEDY | body | more)))


def events(port: int, name: str, **more: Any) -> list[dict[str, Any]]:
    """A streamed answer's events."""
    path, body = ASKS[name]
    lines = request(port, path, GREEDY | body | {"stream": True} | more).splitlines()
    return [
        json.loads(line[6:])
        for line in lines
        if line.startswith("data: ") and line != "data: [DONE]"
    ]


@pytest.mark.parametrize("name", ASKS)
def test_answers_are_plain_decodings(twins: Twins, name: str) -> None:
    """The whole answer, tool calls, reasoning, log probabilities and usage figures too."""
    plain, ours = ask(twins.plain, name), ask(twins.drafted, name)
    assert ours == plain
    assert ours["usage"]
    if name in ("a named tool", "a required tool"):
        (call,) = ours["choices"][0]["message"]["tool_calls"][:1]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["kind"] in ("class", "module")
        assert isinstance(arguments["private"], bool)
    if name == "reasoning":
        assert ours["choices"][0]["message"]["reasoning"]
        assert "thought" not in ours["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", ["chat", "conversation", "a named tool"])
def test_streamed_answers(twins: Twins, name: str) -> None:
    """What a stream's pieces come to, and its usage figures; there are fewer pieces, as several
    tokens come at once."""

    def whole(port: int) -> tuple[str, str, Any, Any]:
        pieces = events(port, name, stream_options={"include_usage": True})
        deltas = [choice["delta"] for piece in pieces for choice in piece["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
        text, arguments = (
            "".join(d.get("content") or "" for d in deltas),
            "".join(c["function"].get("arguments") or "" for c in calls),
        )
        ends = [
            choice["finish_reason"]
            for piece in pieces
            for choice in piece["choices"]
            if choice["finish_reason"]
        ]
        return text, arguments, ends, [piece["usage"] for piece in pieces if piece.get("usage")]

    plain, ours = whole(twins.plain), whole(twins.drafted)
    assert ours == plain
    assert ours[0] or ours[1]
    assert ours[3]


def test_a_streamed_response(twins: Twins) -> None:
    plain, ours = (events(port, "response")[-1] for port in (twins.plain, twins.drafted))
    assert bare(ours["response"]) == bare(plain["response"])


def test_pause_and_resume(twins: Twins) -> None:
    """Requests that were frozen in the middle go on where they were."""
    long = {"max_tokens": 200, "ignore_eos": True}
    plain = ask(twins.plain, "chat", **long)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, twins.drafted, "chat", **long) for _ in range(4)]
        time.sleep(0.3)
        request(twins.drafted, "/pause?mode=keep", {})
        time.sleep(0.3)
        request(twins.drafted, "/resume", {})
        assert [each.result() for each in asked] == [plain] * 4


def test_cancelled_streams(twins: Twins) -> None:
    """Clients that hang up leave nothing running, and the others' answers are what they were."""
    plain = ask(twins.plain, "chat")
    body = GREEDY | ASKS["chat"][1] | {"stream": True, "max_tokens": 300, "ignore_eos": True}

    def hang_up(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", twins.drafted, timeout=60)
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(200 * (1 + i))
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        hung = [pool.submit(hang_up, i) for i in range(6)]
        assert [pool.submit(ask, twins.drafted, "chat").result() for _ in range(3)] == [plain] * 3
        assert all(each.result() is None for each in hung)
    wait_until_idle(twins.drafted)


def test_metrics_of_two_servers_in_one_folder(twins: Twins) -> None:
    """Either server answers, and what is counted of drafts is not lost."""
    assert metric(twins.drafted, "vllm:spec_decode_num_drafts_total") > 0
    assert "vllm_dflash_" in request(twins.drafted, "/metrics")
    request(twins.plain, "/metrics")


def root_of(port: int) -> int:
    """The first process of the server that listens on a port."""
    (root,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"--port {port} " in _text(path).replace("\0", " ")
    ]
    return root


def descendants(name: str, port: int) -> list[int]:
    """The processes called ``name`` of the server that listens on a port."""
    stats = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if fields := _text(stat).rpartition(")")[2].split():
            stats[int(stat.parent.name)] = (
                int(fields[1]),
                _text(stat.parent / "cmdline").replace("\0", " "),
            )
    found, todo = [], [root_of(port)]
    while todo:
        parent = todo.pop()
        children = [pid for pid, (its, _) in stats.items() if its == parent]
        todo += children
        found += [pid for pid in children if name in stats[pid][1]]
    return found


def _text(path: Path) -> str:
    """What a file of /proc says; nothing where its process is gone."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("name", ["plain", "drafted"])
def test_sigterm_under_load(twins: Twins, name: str) -> None:
    """With a ``--shutdown-timeout`` requests that run are answered to their end, and then the
    server ends. The twins' last test.

    It is sent once every stream has begun, so that nothing depends on how fast that is.
    """
    port, begun, told = getattr(twins, name), threading.Barrier(5), threading.Event()
    long = {"max_tokens": 120, "ignore_eos": True}
    body = GREEDY | ASKS["chat"][1] | {"stream": True} | long

    def read() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.readline()
        begun.wait(60)
        told.wait(60)
        return (first + response.read()).decode()

    root, whole = root_of(port), ask(port, "chat", **long)["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(read) for _ in range(4)]
        begun.wait(60)
        os.kill(root, signal.SIGTERM)
        told.set()
        answers = [each.result() for each in asked]
    pieces = [
        [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        for answer in answers
    ]
    texts = [
        "".join(c["delta"].get("content") or "" for p in each for c in p["choices"])
        for each in pieces
    ]
    assert texts == [whole] * 4
    wait_until_gone(root, 60)


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_a_killed_part_ends_the_server(drafter: Path, name: str) -> None:
    """SIGKILL of the engine's process, or of its worker, under load: clients get an error and
    nothing is left running."""
    with drafted(drafter, ends_itself=True) as port, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, port, "chat", max_tokens=300, ignore_eos=True) for _ in range(4)]
        time.sleep(0.2)
        (victim,) = descendants(name, port)
        os.kill(victim, signal.SIGKILL)
        for each in asked:
            error = each.exception(60)
            assert error is None or isinstance(
                error, (urllib.error.URLError, ConnectionError, OSError)
            ), error

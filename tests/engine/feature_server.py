"""The server of ``test_server_features.py``, what is expected of it, and how it is asked."""

import http.client
import json
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.harness import DRAFTER, PROMPTS, TARGET, Batch, Job, held_out_prompts, run_engines
from engine.test_serve import metric, request, server
from lora import make_adapter, merge

COUNT, MAX_TOKENS = 8, 48
SPECULATIVE = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
TEXTS = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:COUNT]]
VERIFIED = "vllm:spec_decode_num_draft_tokens_total"
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A conversation of one message is its text: chat and completion are then the same request."""


@dataclass
class Served:
    port: int
    stop: Callable[[], None]
    """Ends the server and sees that nothing of it is left; a second call does nothing."""


@dataclass
class Expected:
    """Offline engines: the target without a drafter, and the target with the adapter merged,
    without and with one."""

    plain: Batch
    merged: Batch
    merged_drafted: Batch


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("lora") / "adapter", TARGET)


@pytest.fixture(scope="module")
def expected(adapter: Path) -> Expected:
    merged, prompts = merge(adapter.with_name("merged"), TARGET, adapter), held_out_prompts(COUNT)
    jobs = [
        Job(target, drafter, prompts, max_tokens=MAX_TOKENS)
        for target, drafter in ((TARGET, None), (merged, None), (merged, DRAFTER))
    ]
    return Expected(*(batches[0] for batches in run_engines(jobs)))


@pytest.fixture(scope="module")
def served(adapter: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        port = stack.enter_context(
            server(
                "--speculative-config",
                json.dumps(SPECULATIVE),
                "--api-server-count",
                "2",
                "--enable-lora",
                "--max-lora-rank",
                "8",
                "--lora-modules",
                f"adapter={adapter}",
                "--chat-template",
                CHAT_TEMPLATE,
                "--disable-uvicorn-access-log",
                # Whole drafts: their tau is compared with offline engines'.
                "--additional-config",
                json.dumps({"dflash": {"adaptive": False}}),
            )
        )
        yield Served(port, stack.close)


def body(prompt: str | list[int], **fields: Any) -> dict[str, Any]:
    """A greedy completion."""
    common = {
        "model": "embedded",
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return common | {"prompt": prompt} | fields


def complete(port: int, prompt: str | list[int], **fields: Any) -> list[int]:
    return json.loads(request(port, "/v1/completions", body(prompt, **fields)))["choices"][0][
        "token_ids"
    ]


def stream(
    port: int, prompt: str | list[int], chunks: int | None = None, **fields: Any
) -> list[int]:
    """A streamed completion; with ``chunks`` the connection is closed after so many of them."""
    connection, tokens = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body(prompt, stream=True, **fields)),
        {"Content-Type": "application/json"},
    )
    response, seen = connection.getresponse(), 0
    while (
        (line := response.readline())
        and line.strip() != b"data: [DONE]"
        and (chunks is None or seen < chunks)
    ):
        if line.startswith(b"data: "):
            seen += 1
            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    response.close()
    connection.close()
    return tokens


def counted(port: int, run: Callable[[], Any]) -> tuple[float, float]:
    """Drafts and accepted tokens that ``/metrics`` counted while ``run`` ran and until the server
    was idle."""
    before = metric(port, DRAFTS), metric(port, ACCEPTED)
    run()
    wait_until_idle(port)
    return metric(port, DRAFTS) - before[0], metric(port, ACCEPTED) - before[1]


def wait_until_idle(port: int, seconds: float = 30) -> None:
    """Until vLLM's gauges say that nothing runs and nothing waits.

    Of several API servers each sets the gauges by the steps whose answers it was given, and the
    newest value counts: a server that is late with a step overwrites what another said of a later
    one, and the figure stays until there is another step. So a request of one token, which drafts
    nothing and has no page to share, asks for one.
    """
    deadline, tries = time.monotonic() + seconds, 0
    while metric(port, "vllm:num_requests_running") + metric(port, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "requests are still running"
        tries += 1
        if tries % 10 == 0:
            complete(port, [1], max_tokens=1)
        time.sleep(0.2)


def bad_request(port: int, path: str, asked: dict[str, Any]) -> str:
    """The message of the server's answer, which has to be that of a bad request."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        request(port, path, asked)
    assert refused.value.code == 400
    return json.loads(refused.value.read())["error"]["message"]

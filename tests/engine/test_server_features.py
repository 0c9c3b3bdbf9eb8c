"""One ``vllm serve`` with a drafter and two API servers, over real HTTP: each feature of the server
gives what it gives without one.

The server has prefix caching, LoRA and a chat template on together. Expected tokens are plain
decoding's, offline.

    pytest -s tests/engine/test_server_features.py
"""

import json
import re
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.feature_server import (
    COUNT,
    MAX_TOKENS,
    SPECULATIVE,
    TEXTS,
    VERIFIED,
    Expected,
    Served,
    adapter,
    bad_request,
    body,
    complete,
    counted,
    expected,
    served,
    stream,
    wait_until_idle,
)
from engine.harness import TARGET, engine_env, held_out_prompts
from engine.other_vllm import completed
from engine.test_serve import metric, request, until_it_says
from vllm_dflash.cli import main
from vllm_dflash.swap.turns import PATH

__all__ = ["adapter", "expected", "served"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_streaming(served: Served, expected: Expected) -> None:
    """Streamed, whole and offline plain tokens are equal, from both API servers."""
    prompts = held_out_prompts(COUNT)
    with ThreadPoolExecutor(COUNT) as pool:
        streamed = list(pool.map(lambda p: stream(served.port, p), prompts))
        whole = list(pool.map(lambda p: complete(served.port, p), prompts))
    assert streamed == expected.plain.tokens
    assert whole == expected.plain.tokens


def test_chat(served: Served, expected: Expected) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    for text, tokens in list(zip(TEXTS, expected.plain.tokens, strict=True))[:3]:
        chat = {
            "model": "embedded",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = json.loads(request(served.port, "/v1/chat/completions", chat))
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(tokens)


def test_arrivals_and_aborts(served: Served, expected: Expected) -> None:
    """Requests come while others run, and a third of the clients hang up: the others' answers stay,
    and nothing keeps running."""
    prompts = held_out_prompts(COUNT)

    def ask(i: int) -> list[int] | None:
        time.sleep(0.05 * i)
        if i % 3 == 0:
            stream(served.port, prompts[i % COUNT], chunks=1 + i % 4, max_tokens=300)
            return None
        return complete(served.port, prompts[i % COUNT])

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    assert sum(answer is None for answer in answers) == 8
    assert all(
        answer is None or answer == expected.plain.tokens[i % COUNT]
        for i, answer in enumerate(answers)
    )
    wait_until_idle(served.port)
    request(served.port, "/health")
    assert complete(served.port, prompts[0]) == expected.plain.tokens[0]


def test_a_request_says_how_much_is_drafted(served: Served, expected: Expected) -> None:
    """By JSON text, as ``vllm_xargs`` holds no objects; what is malformed is a bad request, and the
    engine goes on."""
    port, tokens = served.port, expected.plain.tokens[0]

    def fields(said: Any) -> dict[str, Any]:
        return {"vllm_xargs": {"dflash": said if isinstance(said, str) else json.dumps(said)}}

    def drafted(said: Any) -> tuple[float, float]:
        before = metric(port, VERIFIED)

        def run() -> None:
            assert complete(port, TEXTS[0], **fields(said)) == tokens

        drafts, _ = counted(port, run)
        return drafts, metric(port, VERIFIED) - before

    assert drafted({"draft": False}) == (0, 0)
    drafts, verified = drafted({"max_draft": 3})
    assert drafts < verified <= 3 * drafts
    _, verified = drafted({"prompt_class": "code"})
    assert verified > 3 * drafts
    until_it_says(port, 'prompt_class="code"')
    chat = {"prompt": None, "messages": [{"role": "user", "content": TEXTS[0]}]}
    for said in ({"max_draft": 8}, {"max_draft": True}, {"max_drafts": 1}, {"draft": 0}, "off"):
        for path, more in (("completions", {}), ("chat/completions", chat)):
            message = bad_request(port, f"/v1/{path}", body(TEXTS[0], **fields(said)) | more)
            assert "vllm_xargs): dflash" in message
            assert ": give" in message
    bad_request(port, "/v1/completions", body(TEXTS[0], vllm_xargs={"dflash": {"draft": False}}))
    assert complete(port, TEXTS[0]) == tokens


def test_structured_output(served: Served) -> None:
    """A regular expression and a JSON schema hold under drafting."""

    def ask() -> None:
        pattern = r"def [a-z]{3,8}_[a-z]{3,8}\(self\):\n    return (None|True|False)"
        answer = request(
            served.port,
            "/v1/completions",
            body(TEXTS[0], structured_outputs={"regex": pattern}, ignore_eos=False),
        )
        text = json.loads(answer)["choices"][0]["text"]
        assert re.fullmatch(pattern, text), text
        schema = {
            "type": "object",
            "properties": {"kind": {"enum": ["class", "module"]}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        chat = {
            "model": "embedded",
            "messages": [{"role": "user", "content": TEXTS[1]}],
            "max_tokens": 64,
            "temperature": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "kind", "schema": schema},
            },
        }
        content = json.loads(request(served.port, "/v1/chat/completions", chat))["choices"][0][
            "message"
        ]["content"]
        assert json.loads(content)["kind"] in ("class", "module")

    drafts, _ = counted(served.port, ask)
    assert drafts > 0


def test_lora(served: Served, expected: Expected) -> None:
    """With the adapter the output is that of the merged weights, and so is tau: the drafter is
    conditioned on the adapter's states.

    The drafter shares the target's embedding, which vLLM wraps for LoRA. The wrapper goes by the
    target's rows: the first request with an adapter killed the engine, and on a batch of the same
    length the block's tokens would have had other rows' adapters.
    """
    prompts, answers = held_out_prompts(COUNT), []

    def ask() -> None:
        with ThreadPoolExecutor(COUNT) as pool:
            answers.extend(pool.map(lambda p: complete(served.port, p, model="adapter"), prompts))

    drafts, accepted = counted(served.port, ask)
    tau = 1 + accepted / drafts
    print(f"\nLoRA: tau {tau:.3f}, merged into the weights {expected.merged_drafted.tau:.3f}")
    assert expected.merged.tokens != expected.plain.tokens
    assert answers == expected.merged.tokens
    assert abs(tau / expected.merged_drafted.tau - 1) < 0.02


def test_prefix_cache(served: Served) -> None:
    """Prompts whose pages are in the prefix cache: the same answers, and tau within 2 % of the cold
    one."""
    text = [token for prompt in held_out_prompts(60) for token in prompt]
    prompts = [text[300 * i : 300 * i + 300] for i in range(6)]
    answers: list[list[int]] = []

    def ask() -> None:
        with ThreadPoolExecutor(6) as pool:
            answers.extend(pool.map(lambda p: complete(served.port, p, max_tokens=128), prompts))

    hits = metric(served.port, "vllm:prefix_cache_hits_total")
    (cold_drafts, cold), (warm_drafts, warm) = counted(served.port, ask), counted(served.port, ask)
    hits = metric(served.port, "vllm:prefix_cache_hits_total") - hits
    cold_tau, warm_tau = 1 + cold / cold_drafts, 1 + warm / warm_drafts
    print(
        f"\nprefix cache: tau {cold_tau:.3f} cold, {warm_tau:.3f} warm; {hits:.0f} of {300 * 6}"
        " prompt tokens from the cache"
    )
    assert hits >= 6 * 256, "pages of 128 tokens on a CPU: two of each prompt"
    assert answers[:6] == answers[6:]
    assert abs(warm_tau / cold_tau - 1) < 0.02


def test_sleep_mode_is_refused_on_a_cpu() -> None:
    """vLLM has sleep mode on GPUs only and says so before anything starts, with a drafter as
    without."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(
            str(TARGET),
            enable_sleep_mode=True,
            speculative_config=dict(SPECULATIVE),
            max_model_len=512,
        ).create_engine_config()


def test_bench_serve(served: Served, tmp_path: Path) -> None:
    """``vllm bench serve`` as a client: every request completes, and its report has the
    acceptance."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "bench",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(served.port),
        "--endpoint",
        "/v1/completions",
        "--model",
        "embedded",
        "--tokenizer",
        str(TARGET),
        "--dataset-name",
        "random",
        "--random-input-len",
        "32",
        "--random-output-len",
        "16",
        "--num-prompts",
        "8",
        "--temperature",
        "0",
        "--ignore-eos",
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "bench.json",
    ]
    done = completed(command, engine_env(), timeout_s=180)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["completed"] == 8
    assert result["spec_decode_acceptance_length"] >= 1
    print(
        "\n".join(
            line for line in done.stdout.splitlines() if "cceptance" in line or "raft" in line
        )
    )


def test_without_the_middleware_there_is_no_swap_endpoint(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        request(served.port, PATH)
    assert main(["swap", "--server", f"http://127.0.0.1:{served.port}", "good"]) == 2


def test_metrics(served: Served) -> None:
    """``/metrics`` of either API server counts drafts, draft tokens and accepted tokens, these by
    position too."""
    metrics = request(served.port, "/metrics")
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert metric(served.port, f"vllm:spec_decode_num_{name}_total") > 0
    positions = set(
        re.findall(
            r'vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="(\d+)"', metrics
        )
    )
    assert positions == {str(i) for i in range(7)}


def test_shutdown(served: Served) -> None:
    """SIGTERM ends the server with both API servers, the engine and the worker. The last test: it
    stops the shared server."""
    served.stop()
    with pytest.raises(OSError, match="refused"):
        request(served.port, "/health")

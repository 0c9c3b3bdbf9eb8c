"""Metrics of real servers on the embedded pair: against what each response says of itself, against
the client's count, against vLLM's own.

pytest -s tests/engine/test_metrics.py
"""

import json
import os
import signal
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import forks
from engine.harness import DRAFTER, TARGET, engine_env, held_out_prompts
from engine.test_serve import fork, request, server
from vllm_dflash.cli import main
from vllm_dflash.metrics.figures import Scrape, figures
from vllm_dflash.metrics.snapshots import USERS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
COUNT, MAX_TOKENS = 6, 40
SPECULATIVE = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_dflash.metrics.read import read
target, speculative, prompts = json.loads(sys.argv[1])
def run(**args):
    llm = LLM(
        target, dtype="float32", enforce_eager=True, max_model_len=512,
        kv_cache_memory_bytes=1 << 28, **args
    )
    asked, params = [{"prompt_token_ids": p} for p in prompts], dict(temperature=0, ignore_eos=True)
    outputs = llm.generate(asked, SamplingParams(max_tokens=40, **params), use_tqdm=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found = {
        "tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "text": read(wait=False),
        "watched": "update_from_output" in vars(scheduler),
    }
    llm.llm_engine.engine_core.shutdown()
    return found | {"after": read(wait=False)}
reports = [run(), run(speculative_config=speculative)]
print("REPORT" + json.dumps(reports))
"""


def complete(port: int, prompt: list[int], max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """A greedy completion."""
    body = {
        "model": "embedded",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "prompt": prompt,
    }
    return json.loads(request(port, "/v1/completions", body))


def send(port: int) -> list[dict[str, Any]]:
    """Completions, all at once; their prompts begin alike and are longer than a page of the
    cache."""
    prompts = held_out_prompts(COUNT)
    begin = [token for prompt in prompts for token in prompt][:280]
    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(lambda prompt: complete(port, begin + prompt), prompts))


def go_on(port: int) -> list[dict[str, Any]]:
    """A completion longer than a page of the cache, and its continuations: all of it is text that
    the drafter knows."""
    [prompt], answers = held_out_prompts(1), []
    for max_tokens in (280, *[MAX_TOKENS] * (COUNT - 1)):
        answers.append(complete(port, prompt, max_tokens))
        prompt = prompt + answers[-1]["choices"][0]["token_ids"]
    return answers


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if "vllm_dflash_" in line]


def total(text: str, name: str, *labels: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels)
    )


def check(text: str, answers: list[dict[str, Any]]) -> None:
    """The metrics are the sums of what the responses say, of the client's tokens, and of vLLM's
    counters."""
    own = [answer["metrics"]["speculative_decoding"] for answer in answers]
    histograms = [
        sum(column) for column in zip(*(o["acceptance_histogram"] for o in own), strict=True)
    ]
    verifications, accepted = sum(histograms), sum(j * count for j, count in enumerate(histograms))
    assert verifications > 0
    assert total(text, "vllm_dflash_accepted_length_count") == verifications
    assert total(text, "vllm_dflash_accepted_length_sum") == verifications + accepted
    for j, count in enumerate(histograms[1:], 1):
        assert total(text, "vllm_dflash_accepted_tokens_total", f'position="{j}"') == sum(
            histograms[j:]
        ), count
        reached = total(text, "vllm_dflash_reached_tokens_total", f'position="{j}"')
        verified = total(text, "vllm_dflash_verified_tokens_total", f'position="{j}"')
        drafted = total(text, "vllm_dflash_drafted_tokens_total", f'position="{j}"')
        assert sum(histograms[j:]) <= reached <= min(verified, sum(histograms[j - 1 :]))
        assert verified <= drafted
    assert total(text, "vllm_dflash_verified_tokens_total") == total(
        text, "vllm:spec_decode_num_draft_tokens_total"
    )
    assert (
        total(text, "vllm_dflash_accepted_tokens_total")
        == accepted
        == total(text, "vllm:spec_decode_num_accepted_tokens_total")
    )
    assert total(text, "vllm_dflash_output_tokens_total") == sum(
        a["usage"]["completion_tokens"] for a in answers
    )
    assert total(text, "vllm_dflash_request_accepted_length_count") == len(
        [o for o in own if sum(o["acceptance_histogram"])]
    )
    assert total(text, "vllm_dflash_context_verifications_total") == verifications
    assert total(text, "vllm_dflash_context_committed_tokens_total") == verifications + accepted
    lengths = total(text, "vllm_dflash_draft_length_count")
    assert lengths - total(text, "vllm_dflash_speculation_refused_total") == verifications
    assert total(text, "vllm_dflash_drafter_seconds_count") > 0
    assert (
        total(text, "vllm_dflash_step_seconds_sum")
        > total(text, "vllm_dflash_drafter_seconds_sum")
        > 0
    )
    assert total(text, "vllm_dflash_draft_context_positions_total", 'state="missing"') == 0
    assert total(text, "vllm_dflash_draft_context_positions_total") > 0


def text_after_writing(port: int) -> str:
    """/metrics once everything is in it: it is at most a second behind."""
    time.sleep(2.5)
    return request(port, "/metrics")


def kill_engine(port: int, folder: Path) -> None:
    """The server ends with its engine, unasked and so without tidying up; a second later it shows
    no series of that, if it still runs."""
    [engine] = {int(file.stem.split("-")[2]) for file in folder.glob("engine-*.json")}
    os.kill(engine, signal.SIGKILL)
    time.sleep(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert "vllm_dflash_accepted_length" not in request(port, "/metrics")
            time.sleep(0.2)
        except (urllib.error.URLError, ConnectionError):
            return
    raise AssertionError("the server goes on without its engine")


def test_one_api_server_with_adaptive_drafting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its engine then dies; a server that is started again in the same folder counts from zero."""
    flags = (
        "--speculative-config",
        json.dumps(SPECULATIVE),
        "--per-request-spec-decode-metrics",
        "summary",
    )
    env = {USERS: str(tmp_path)}
    with server(
        *flags, "--additional-config", json.dumps({"dflash": {"adaptive": True}}), env=env
    ) as port:
        answers = go_on(port) + send(port)
        text = text_after_writing(port)
        check(text, answers)
        assert main(["top", f"127.0.0.1:{port}", "--json"]) == 0
        [shown] = json.loads(capsys.readouterr().out)["engines"]
        assert main(["top", f"127.0.0.1:{port}", "--once"]) == 0
        print(capsys.readouterr().out)
        kill_engine(port, tmp_path)
    assert total(text, "vllm_dflash_controller_steps_total") > 0
    assert total(text, "vllm_dflash_confidence_tokens_total") == total(
        text, "vllm_dflash_reached_tokens_total"
    )
    assert total(text, "vllm_dflash_confidence_accepted_tokens_total") == total(
        text, "vllm_dflash_accepted_tokens_total"
    )
    # A continuation finds its beginning in the prefix cache.
    assert total(text, "vllm_dflash_draft_context_positions_total", 'state="reused"') > 0
    assert total(text, "vllm_dflash_context_verifications_total", 'prefix_cached="true"') > 0
    [found] = figures(Scrape.parse(text, 0.0))
    assert shown["tau"] == found["tau"] > 1
    assert found["baseline"] == "cost_model"
    assert 0.1 < total(text, "vllm_dflash_estimated_speedup") < 10
    with server(*flags, env=env) as port:
        answers = send(port)
        check(text_after_writing(port), answers)


def test_two_api_servers_two_engines_and_a_multiprocess_directory_of_the_users(
    tmp_path: Path,
) -> None:
    """Every API server answers the same, scrape after scrape, and nothing is counted twice; each
    data-parallel engine has series of its own. Every process imports vLLM, and what reads the
    folder's variable at its import, itself."""
    flags = (
        "--api-server-count",
        "2",
        "--data-parallel-size",
        "2",
        "--per-request-spec-decode-metrics",
        "summary",
    )
    with server(
        "--speculative-config",
        json.dumps(SPECULATIVE),
        *flags,
        env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        start=partial(fork, kind=forks.LIBRARIES),
    ) as port:
        answers = send(port)
        first = text_after_writing(port)
        # Each scrape is a connection of its own, which either API server may take.
        scrapes = [ours(request(port, "/metrics")) for _ in range(8)]
    check(first, answers)
    for engine in ('engine="0"', 'engine="1"'):
        assert (
            total(first, "vllm_dflash_output_tokens_total", engine)
            == total(first, "vllm:generation_tokens_total", engine)
            > 0
        )
        assert total(first, "vllm_dflash_drafter_info", engine) == 1
    assert all(scrape == ours(first) for scrape in scrapes)
    lines = [line.rpartition(" ")[0] for line in ours(first) if not line.startswith("#")]
    assert len(lines) == len(set(lines))
    # Without plain steps there is no baseline, and no speed-up is guessed.
    assert not [line for line in lines if "speedup" in line or "baseline" in line]


def test_offline_and_without_a_drafter(tmp_path: Path) -> None:
    """Offline the documented call has the figures; an engine without our drafter is not watched;
    one that has ended has no series."""
    given = json.dumps([str(TARGET), SPECULATIVE, held_out_prompts(4)])
    script, log = tmp_path / "offline.py", tmp_path / "log"
    script.write_text(OFFLINE)
    files = {0: Path(os.devnull), 1: log}
    done = forks.start([str(script), given], engine_env(), files).wait(300)
    assert done == 0, log.read_text()[-3000:]
    plain, drafted = json.loads(
        next(line for line in log.read_text().splitlines() if line.startswith("REPORT"))[6:]
    )
    assert (plain["text"], plain["watched"], plain["after"]) == ("", False, "")
    assert drafted["watched"]
    assert (
        total(drafted["text"], "vllm_dflash_output_tokens_total")
        == drafted["tokens"]
        == 4 * MAX_TOKENS
    )
    assert total(drafted["text"], "vllm_dflash_accepted_length_count") > 0
    assert "vllm_dflash_accepted_length" not in drafted["after"]

"""``vllm serve`` with the flag, over real HTTP; and ordinary serving, which the plug-in never
touches."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine import forks
from engine.harness import (
    DRAFTER,
    TARGET,
    Batch,
    engine_env,
    held_out_prompts,
    run_engine,
    wait_until_gone,
)
from examples.demos.ports import free_port

pytestmark = pytest.mark.engine


class Command(subprocess.Popen[bytes]):
    """A process started by its command line, with what it starts in a process group of its own."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        with log.open("w") as output:
            super().__init__(command, env=env, stdout=output, stderr=output, start_new_session=True)

    def runs(self) -> bool:
        return self.poll() is None

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def fork(command: list[str], env: dict[str, str], log: Path, kind: str = "") -> forks.Fork:
    """The same as a fork of a process that has vLLM imported, as are those that it spawns; with
    ``forks.LIBRARIES`` each imports vLLM itself, in the environment that it is given."""
    return forks.start(command, env, {0: Path(os.devnull), 1: log}, kind)


@contextmanager
def server(
    *flags: str,
    env: dict[str, str] | None = None,
    model: Path = TARGET,
    ends_itself: bool = False,
    start: Callable[[list[str], dict[str, str], Path], Command | forks.Fork] = fork,
) -> Iterator[int]:
    """A running ``vllm serve`` on the embedded target in float32; yields its port. Nothing of it is
    left running.

    ``ends_itself``: the test kills a part of it, and the rest has to end without being told.
    ``start``: ``Command`` where every process is to import vLLM itself, as a user's do.
    """
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--served-model-name",
        "embedded",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--kv-cache-memory-bytes",
        str(1 << 28),
        "--generation-config",
        "vllm",
        *flags,
    ]
    with tempfile.TemporaryDirectory() as folder:
        # Not a pipe: one that nobody reads would stop the server once it is full.
        log = Path(folder, "log")
        process = start(
            command, engine_env({"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(env or {})}), log
        )
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    request(port, "/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert process.runs(), log.read_text()[-6000:]
                    assert time.monotonic() < deadline, "the server did not answer in time"
                    time.sleep(0.2)
            yield port
            if not ends_itself and process.runs():  # a test may have ended it already
                os.kill(process.pid, signal.SIGTERM)
            process.wait(60)
            wait_until_gone(process.pid)
        finally:
            if process.runs():
                process.kill()


def request(port: int, path: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=120) as response:
        return response.read().decode()


def metric(port: int, name: str) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in request(port, "/metrics").splitlines()
        if line.startswith(name + "{")
    )


def until_it_says(port: int, sample: str) -> None:
    """Waits for a sample in ``/metrics``, which are written once a second."""
    for _ in range(50):
        if sample in request(port, "/metrics"):
            return
        time.sleep(0.2)
    raise AssertionError(f"no {sample} in /metrics")


def test_completion_over_http(tmp_path: Path) -> None:
    """The flag is all it takes; the answer is the one that plain decoding gives, and the drafter's
    acceptance is in ``/metrics``.

    Beside it the traffic recorder, asked for: the line that it writes is one that training reads.
    """
    prompt = held_out_prompts(1)[0]
    expected = run_engine(TARGET, None, [prompt], max_tokens=96)[0].tokens[0]
    speculative = json.dumps(
        {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
    )
    recorder = ("--middleware", "vllm_dflash.training.recorder.TrafficRecorder")
    with server(
        "--speculative-config",
        speculative,
        *recorder,
        env={"VLLM_DFLASH_RECORD": str(tmp_path)},
        start=Command,
    ) as port:
        body = {
            "model": "embedded",
            "prompt": prompt,
            "max_tokens": 96,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = json.loads(request(port, "/v1/completions", body))
        assert answer["choices"][0]["token_ids"] == expected
        drafts, accepted = (
            metric(port, "vllm:spec_decode_num_drafts_total"),
            metric(port, "vllm:spec_decode_num_accepted_tokens_total"),
        )
    print(f"served over HTTP: {drafts:.0f} drafts, tau {1 + accepted / drafts:.2f}")
    assert drafts > 0
    assert accepted > 0
    recorded = [
        json.loads(line) for path in tmp_path.iterdir() for line in path.read_text().splitlines()
    ]
    assert recorded == [
        {
            "prompt_token_ids": prompt,
            "response": answer["choices"][0]["text"],
            "finish_reason": "length",
        }
    ]


def test_ordinary_serving_is_not_touched(plain_float32: list[Batch]) -> None:
    """Without a speculative config the engine's output is that of an engine with the plug-in
    switched off."""
    prompts = held_out_prompts(8)
    off = run_engine(TARGET, None, prompts, env={"VLLM_DFLASH": "0"})[0]
    assert off.tokens == plain_float32[2].tokens[:8]


def test_switched_off_vllm_drafts_itself(random_target: Path, random_drafter: Path) -> None:
    """With ``VLLM_DFLASH=0`` the drafts are vLLM's own: the harness asserts whose proposer ran."""
    batch = run_engine(
        random_target, random_drafter, [[5, 6, 7, 8]], max_tokens=8, env={"VLLM_DFLASH": "0"}
    )[0]
    assert batch.report["counters"]["drafts"] > 0

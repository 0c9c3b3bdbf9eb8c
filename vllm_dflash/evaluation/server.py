"""A server that already runs, measured by ``vllm bench serve``, with tau from the server's own
counters before and after.

Limits: what the server does not tell is not there (steps, committed tokens, memory, outputs);
conditional acceptance only where every draft was as long as the longest, for its counters have no
other honest denominator.

    pytest tests/unit/test_bench_server.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.acceptance import tau
from vllm_dflash.api_keys import headers_of, refused_key, without_secrets
from vllm_dflash.engines.process import EngineFailedError
from vllm_dflash.evaluation.job import Job
from vllm_dflash.evaluation.methods import UsageError

NAME = "server"
_LINES_SHOWN = 12
_SAMPLE = re.compile(
    r"^vllm:(?P<name>spec_decode_\w+|num_preemptions)_total\{(?P<labels>[^}]*)\} (?P<value>\S+)$"
)
_POSITION = re.compile(r'position="(\d+)"')


class Server:
    """Drives the server at a base URL; ``tokenizer`` turns prompts back into text, which is what
    the client sends."""

    def __init__(self, url: str, tokenizer_path: str, tokenizer: Any, model: str) -> None:
        self._url, self._tokenizer_path, self._tokenizer, self._model = (
            url.rstrip("/"),
            tokenizer_path,
            tokenizer,
            model,
        )

    def run(
        self, job: Job, on_request: Callable[[], object]
    ) -> Generator[None, None, dict[str, Any]]:
        """See ``job.Engine``; all in one slice, and requests are reported when all have ended."""
        yield
        before = counters(_get(self._url, "/metrics"))
        with tempfile.TemporaryDirectory() as folder:
            result = self._bench(job, Path(folder))
        after = counters(_get(self._url, "/metrics"))
        for _ in job.prompts:
            on_request()
        if result["completed"] != len(job.prompts):
            raise EngineFailedError(
                f"{len(job.prompts) - result['completed']} of {len(job.prompts)} requests failed:"
                " see the server's log"
            )
        return measured(result, before, after)

    def _bench(self, job: Job, folder: Path) -> dict[str, Any]:
        prompts, out = folder / "prompts.jsonl", folder / "result.json"
        rows = zip(job.prompts, job.max_tokens, strict=True)
        prompts.write_text(
            "".join(
                json.dumps({"prompt": self._tokenizer.decode(list(ids)), "output_tokens": n}) + "\n"
                for ids, n in rows
            )
        )
        # The client needs no engine, so none of ours is loaded into it.
        env = os.environ | {"VLLM_DFLASH": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(
            self._command(job, prompts, out),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode or not out.is_file():
            lines = done.stdout.strip().splitlines()[-_LINES_SHOWN:]
            raise EngineFailedError(
                f"`vllm bench serve` ended with {done.returncode}: {lines[-1] if lines else ''}",
                "\n".join(lines),
            )
        return json.loads(out.read_text())

    def _command(self, job: Job, prompts: Path, out: Path) -> list[str]:
        """vLLM's own client, which reads the prompts and writes its result to ``out``."""
        return [
            str(Path(sys.executable).with_name("vllm")),
            "bench",
            "serve",
            "--base-url",
            self._url,
            "--endpoint",
            "/v1/completions",
            "--model",
            self._model,
            "--tokenizer",
            self._tokenizer_path,
            "--dataset-name",
            "custom",
            "--dataset-path",
            str(prompts),
            "--custom-output-len",
            "-1",
            "--skip-chat-template",
            "--disable-shuffle",
            "--num-prompts",
            str(len(job.prompts)),
            "--max-concurrency",
            str(job.concurrency),
            "--temperature",
            f"{job.temperature:g}",
            "--ignore-eos",
            "--disable-tqdm",
            "--percentile-metrics",
            "ttft,tpot",
            "--metric-percentiles",
            "50,95",
            "--save-result",
            "--result-dir",
            str(out.parent),
            "--result-filename",
            out.name,
        ]


class KeyRefusedError(UsageError):
    """The server asks for an API key, and was given none, or another."""


def connect(url: str, key: str | None = None) -> tuple[str, str]:
    """The served model's name, and where it was loaded from.

    Raises:
        KeyRefusedError: it does not answer to this API key.
        UsageError: nobody answers there, or it is no vLLM server.
    """
    try:
        model = json.loads(_get(url.rstrip("/"), "/v1/models", key))["data"][0]
        return model["id"], model.get("root") or model["id"]
    except KeyRefusedError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EngineFailedError) as error:
        raise UsageError(
            f"--server {url}: no vLLM server answers ({error}): give the address of one, such as"
            " http://127.0.0.1:8000"
        ) from None


def counters(text: str) -> dict[str, Any]:
    """Speculation's counters in a page of ``/metrics``, summed over engines; ``per_position`` by
    position."""
    values: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    for line in text.split("\n"):
        found = _SAMPLE.match(line)
        if found is None:
            continue
        position = _POSITION.search(found["labels"])
        if position is not None:
            positions[int(position[1])] += float(found["value"])
        else:
            values[found["name"]] += float(found["value"])
    return {**values, "per_position": dict(positions)}


def measured(
    result: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """A run's figures from the client's report and the server's counters."""

    def grown(name: str) -> int:
        return int(after.get(name, 0) - before.get(name, 0))

    drafts, verified, accepted = (
        grown(f"spec_decode_num_{name}") for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    at = [
        int(count - before["per_position"].get(i, 0))
        for i, count in sorted(after["per_position"].items())
    ]
    whole = bool(drafts) and verified == drafts * len(at)
    return {
        "seconds": result["duration"],
        "requests": result["completed"],
        "tokens": result["total_output_tokens"],
        "tokens_per_second": result["output_throughput"],
        "ttft_p50_ms": result["p50_ttft_ms"],
        "ttft_p95_ms": result["p95_ttft_ms"],
        "tpot_p50_ms": result["p50_tpot_ms"],
        "tpot_p95_ms": result["p95_tpot_ms"],
        "drafts": drafts,
        "verified": verified,
        "accepted": accepted,
        "wasted": verified - accepted,
        "tau": tau(accepted, drafts),
        "preemptions": grown("num_preemptions"),
        "accepted_at": at if whole else [],
        "reached": [drafts, *at[:-1]] if whole else [],
    }


def _get(url: str, path: str, key: str | None = None) -> str:
    try:
        request = urllib.request.Request(url + path, headers=headers_of(key))
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise KeyRefusedError(f"--server {without_secrets(url)} {refused_key(key)}") from None
        raise EngineFailedError(f"{url}{path} does not answer: {error}") from None
    except (urllib.error.URLError, ValueError) as error:
        raise EngineFailedError(f"{url}{path} does not answer: {error}") from None

"""Starts engines for a test in a process of their own, and turns their reports into what tests
compare."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine import forks

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "examples" / "embedded_pair"
TARGET, DRAFTER, DFLARE, PROMPTS = (
    PAIR / "target",
    PAIR / "dflash",
    PAIR / "dflare",
    PAIR / "prompts.jsonl",
)


@dataclass(frozen=True)
class Batch:
    """One pass over the prompts at one batch size."""

    prompts: list[list[int]]
    report: dict[str, Any]
    coverage: dict[str, int] = field(default_factory=dict)
    """The proposer's counts of context positions at the engine's end: computed, reused, missing."""

    @property
    def tokens(self) -> list[list[int]]:
        """Generated token ids of each prompt."""
        return self.report["tokens"]

    @property
    def tau(self) -> float:
        """Acceptance length from vLLM's own counters: 1 + accepted / drafts."""
        counters = self.report["counters"]
        return 1 + counters["accepted"] / counters["drafts"]

    @cached_property
    def drafts(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Each draft with its request's whole committed sequence; drafts past the sequence's end
        are left out.

        So are those of a prompt that is not prefilled to its end: nobody takes them.
        """
        first = min(d["request"] for d in self.report["drafts"])
        found = []
        for draft in self.report["drafts"]:
            prompt, output = (
                self.prompts[draft["request"] - first],
                self.tokens[draft["request"] - first],
            )
            if len(prompt) <= draft["anchor"] < len(prompt) + len(output):
                found.append((prompt + output, draft))
        return found


@dataclass(frozen=True)
class Job:
    """One engine and what it generates, greedy unless ``sampling`` says otherwise."""

    target: Path
    drafter: Path | None
    prompts: Sequence[Sequence[int]]
    dtype: str = "float32"
    num_speculative_tokens: int = 7
    max_tokens: int | Sequence[int] = 128
    """Of all, or of each: ``worker.py`` alone takes those."""
    batch_sizes: Sequence[int] = (16,)
    max_model_len: int = 512
    record: bool = False
    logprobs: int | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    kv_cache_memory_bytes: int = 1 << 27
    speculative_config: dict[str, Any] = field(default_factory=dict)
    """Further keys of vLLM's speculative config."""
    adaptive: bool = False
    """Whether the controller chooses how much to draft and verify; else every draft is whole and
    verified whole."""
    slow_drafts: float | None = None
    """By what factor steps that draft seem longer to the controller; then the report's
    ``verified`` is filled."""
    skip_requests: Sequence[int] = ()
    """Prompts, by their place in a batch, for which the controller drafts nothing and whole drafts
    for the others; then ``verified`` is filled too."""
    skip_steps: tuple[int, int] | None = None
    """Steps, from the first to before the second, that run without the drafter."""
    sampling: dict[str, Any] | Sequence[dict[str, Any]] = field(default_factory=dict)
    """Of ``SamplingParams``, where it is not greedy; of several each prompt has the next."""
    as_embeddings: Sequence[bool] = ()
    """Whether each prompt is given as the embeddings of its tokens; empty: none is."""

    def to_json(self) -> dict[str, Any]:
        speculative = {
            "method": "dflash",
            "model": str(self.drafter),
            "num_speculative_tokens": self.num_speculative_tokens,
        } | self.speculative_config
        return {
            "target": str(self.target),
            "speculative_config": speculative if self.drafter else None,
            "prompts": [list(p) for p in self.prompts],
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
            "batch_sizes": list(self.batch_sizes),
            "max_model_len": self.max_model_len,
            "record": self.record,
            "logprobs": self.logprobs,
            "engine_args": (
                {"additional_config": {"dflash": {"adaptive": self.adaptive}}} | self.engine_args
            ),
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "slow_drafts": self.slow_drafts,
            "skip_requests": list(self.skip_requests),
            "skip_steps": self.skip_steps,
            "sampling": self.sampling,
            "as_embeddings": list(self.as_embeddings),
        }


def run_engine(
    target: Path,
    drafter: Path | None,
    prompts: Sequence[Sequence[int]],
    *,
    env: dict[str, str] | None = None,
    **changes: Any,
) -> list[Batch]:
    """Runs the prompts through one vLLM engine, once for each batch size; ``changes`` are the
    fields of ``Job``."""
    return run_engines([Job(target, drafter, prompts, **changes)], env=env)[0]


def run_engines(jobs: Sequence[Job], *, env: dict[str, str] | None = None) -> list[list[Batch]]:
    """Runs the jobs one after the other in one new process: what starts slowly, vLLM's imports, is
    paid once."""
    reports = run_worker("worker.py", [job.to_json() for job in jobs], env)
    native = (env or {}).get("VLLM_DFLASH") == "0"
    for job, report in zip(jobs, reports, strict=True):
        if job.drafter is not None:
            assert report["proposer"].startswith("vllm." if native else "vllm_dflash."), (
                f"drafted by {report['proposer']}"
            )
    return [
        [
            Batch([list(p) for p in job.prompts], batch, report["coverage"])
            for batch in report["batches"]
        ]
        for job, report in zip(jobs, reports, strict=True)
    ]


def run_worker(
    script: str,
    jobs: Sequence[dict[str, Any]],
    env: dict[str, str] | None = None,
    timeout_s: float = 800,
    kind: str = "",
) -> list[Any]:
    """Hands the jobs to a script of this folder that ends in ``engines.answer_jobs``; its reports.
    It has to leave nothing running. ``kind`` is that of ``forks.start``."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out, output = (
            Path(folder, name) for name in ("jobs.json", "reports.json", "output.txt")
        )
        asked.write_text(json.dumps(jobs))
        process = forks.start(
            [str(Path(__file__).with_name(script)), str(out)],
            engine_env(env),
            {0: asked, 1: output},
            kind,
        )
        try:
            process.wait(timeout_s)
        except BaseException:
            process.kill()
            raise
        if not out.is_file():
            raise RuntimeError(
                f"the engine's process ended without a report:\n{output.read_text()[-6000:]}"
            )
        wait_until_gone(process.pid)
        return json.loads(out.read_text())


def engine_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """An environment for one-process CPU engines, with this checkout's package on the path; what
    this process has been told already is told again."""
    from vllm_dflash.patching import TOLD
    from vllm_dflash.profiles import THREADS
    from vllm_dflash.supported import PROBLEM

    own = (TOLD, PROBLEM, THREADS)
    return (
        {name: value for name, value in os.environ.items() if name not in own}
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        | (extra or {})
    )


def wait_until_gone(group: int, seconds: float = 20) -> None:
    """Waits until no process of a process group runs any more; one that has ended and is only not
    collected yet does not count."""
    deadline = time.monotonic() + seconds
    while running := [p for p in Path("/proc").glob("[0-9]*/stat") if _runs_in_group(p, group)]:
        assert time.monotonic() < deadline, (
            "still running:"
            f" {[p.with_name('cmdline').read_text().replace(chr(0), ' ') for p in running]}"
        )
        time.sleep(0.05)


def _runs_in_group(stat: Path, group: int) -> bool:
    try:
        state, _, pgrp, *_ = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(pgrp) == group and state != "Z"


def held_out_prompts(count: int) -> list[list[int]]:
    """The first ``count`` held-out prompts of the embedded pair, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = PROMPTS.read_text().splitlines()[:count]
    assert len(lines) == count, f"{PROMPTS} holds only {len(lines)} prompts"
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]

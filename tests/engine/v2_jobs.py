"""Engines of vLLM's V2 model runner on a CPU, as tests ask for them: what each is to run, and what
it drafted and put out.

``run_engines(jobs)`` starts ``v2_worker.py`` as a script, which reads jobs and writes results.
Limits: about 0.1 to 0.5 s per engine step on a toy model; nothing here is fit for timing.

    pytest tests/engine/test_v2.py
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("v2_worker.py")


@dataclass(frozen=True)
class Request:
    """What differs for one prompt from a greedy request that is there from the start and runs to
    its end."""

    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of SamplingParams."""
    wave: int = 0
    """Waves run one after the other: a later one starts when the one before has no unfinished
    request."""
    arrives: int = 0
    """Engine steps of its wave before it is added."""
    aborted: int | None = None
    """Engine steps of its wave after which it is aborted."""
    follows: int | None = None
    """A prompt of an earlier wave, which goes in front of its own, with that one's output."""


@dataclass(frozen=True)
class Job:
    """One engine and its requests, greedy where ``requests`` does not say otherwise."""

    target: str
    prompts: list[list[int]]
    max_tokens: int
    drafter: str | None = None
    num_speculative_tokens: int = 7
    dtype: str = "float32"
    max_model_len: int = 256
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 32
    script_from: int | None = None
    """An earlier job of the same call, of the same prompts. Where given, every second prompt's
    drafts have their first 0 to K tokens (drawn at random) replaced by that job's output after
    recording, so that an untrained drafter's steps accept and reject in all lengths."""
    speculative_config: dict[str, Any] = field(default_factory=dict)
    """Further keys of vLLM's speculative config."""
    adaptive: bool | None = False
    """Whether our controller chooses how much to draft and verify; else every draft is whole and
    verified whole. None: left out of the settings."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of LLM, or others than here."""
    requests: dict[int, Request] = field(default_factory=dict)
    """By prompt, where a request is special."""
    device: str = ""
    """"watched" or "graphs": the drafter on ``fake_device``, eagerly or by CUDA graphs."""
    measured: bool = False
    """Whether steps are measured on that device before the first request."""

    @classmethod
    def read(cls, raw: dict[str, Any]) -> "Job":
        """From JSON, whose keys are strings."""
        return cls(
            **raw
            | {"requests": {int(i): Request(**request) for i, request in raw["requests"].items()}}
        )


@dataclass(frozen=True)
class Draft:
    """One request's draft in one engine step, before any scripting."""

    anchor: int
    """n: the position of the token that the target has sampled but not run over."""
    anchor_token: int
    tokens: list[int]
    """The drafted tokens for positions n + 1 .. n + K."""
    num_reqs: int
    """The requests in the step."""
    completion: int = 0
    """Which of the prompt's completions, where it has several."""
    step: int = 0
    """The engine's, those that draft nothing counted."""


@dataclass(frozen=True)
class Work:
    """What a step's ``propose`` ran."""

    num_reqs: int
    k: int
    """The drafts that the step asked for."""
    forwarded: int
    """Rows through the draft layers."""
    ranked: int
    """Rows through lm_head."""
    replayed: int
    """The requests of the CUDA graph that was replayed; 0: none was."""


@dataclass(frozen=True)
class Result:
    """What an engine did; lists are per prompt."""

    outputs: list[list[int]]
    """Empty where a request was aborted."""
    drafts: list[list[Draft]]
    speculator: str | None
    draft_model: str | None
    steps: int
    completions: list[list[list[int]]] = field(default_factory=list)
    """All completions; ``outputs`` has the first of each."""
    texts: list[str] = field(default_factory=list)
    logprobs: list[list[list[tuple[int, float]]]] = field(default_factory=list)
    """Per position of the first completion: (token, logprob), where asked for."""
    cached_tokens: list[int] = field(default_factory=list)
    """Prompt tokens that the prefix cache held."""
    prompts: list[list[int]] = field(default_factory=list)
    """As they were run: see ``Request.follows``."""
    preempted: list[tuple[int, int]] = field(default_factory=list)
    """(prompt, length of its sequence) for each request that lost its KV cache to another and was
    resumed later."""
    kv_cache_groups: int = 1
    work: list[Work] = field(default_factory=list)
    decodes: list[tuple[int, int, int]] = field(default_factory=list)
    """On ``fake_device``, of each step in which all requests decode: their number, their tokens,
    and the tokens of the target's CUDA graph; 0: there is none."""
    is_asynchronous: bool = False
    """Whether a step is scheduled before the one before has ended."""
    max_model_len: int = 0
    confidences: list[int] = field(default_factory=list)
    """The shape of what the speculator hands to vLLM's adaptive verification."""
    attention_rows: int = 0
    """The largest graph that the draft layers' attention plans for."""
    profile: dict[str, Any] | None = None
    """What the controller begins with; None: there is none, or a guess."""
    cells: int = 0
    """Of ``Job.measured``."""
    adapts: bool = False
    """Whether the controller plans steps."""


def run_engines(
    jobs: Sequence[Job], timeout_s: float = 900, env: dict[str, str] | None = None
) -> list[Result]:
    """Runs the jobs one after the other in one new process, with ``env`` besides; raises with the
    end of its output where it fails."""
    from engine import forks
    from engine.harness import engine_env

    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "jobs.json"), Path(scratch, "results.json")
        question.write_text(json.dumps([asdict(job) for job in jobs]))
        output = Path(scratch, "output.txt")
        process = forks.start(
            [str(_WORKER), str(question), str(answer)],
            engine_env(env),
            {0: Path(os.devnull), 1: output},
            forks.INTERPRETER,
        )
        try:
            process.wait(timeout_s)
        except BaseException:
            process.kill()
            raise
        if not answer.is_file():
            raise RuntimeError(
                f"the engines' process ended without results:\n{output.read_text()[-6000:]}"
            )
        results = json.loads(answer.read_text())
    return [
        Result(
            **raw
            | {
                "drafts": [[Draft(**d) for d in drafts] for drafts in raw["drafts"]],
                "work": [Work(**work) for work in raw["work"]],
                "decodes": [tuple(decode) for decode in raw["decodes"]],
            }
        )
        for raw in results
    ]

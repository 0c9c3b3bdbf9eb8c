"""Runs vLLM's V2 model runner, which needs Triton, on a CPU: its kernels go through Triton's
interpreter.

The interpreter is chosen when Triton is imported and the runner when vLLM is, so these engines have
a process of their own: ``run_engines(jobs)`` starts this file as a script, which reads jobs and
writes what each engine drafted and put out.
Limits: about 0.1 to 0.5 s per engine step on a toy model; nothing here is fit for timing.

    pytest tests/engine/test_v2.py
"""

import gc
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


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
            [__file__, str(question), str(answer)],
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


def use_interpreter() -> None:
    """Readies this process for the V2 runner on a CPU; must come before the first import of
    vLLM. Again, as in a fork of one that did, it only sets the environment."""
    used = "triton" in sys.modules and "cpu" in sys.modules["triton"].backends.backends
    if not used and "vllm" in sys.modules:
        raise RuntimeError(
            "vLLM is already imported: it has chosen its runner. Start a process of its own"
        )
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    # One thread, pinned to no core: a toy gains nothing by more, and beside other work pinned
    # threads wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if used:
        return
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpretedDriver(DriverBase):
        """vLLM takes Triton for absent unless a driver is active; the interpreter itself asks the
        driver for nothing."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        @staticmethod
        def map_python_to_cpp_type(ty: str) -> str:
            return ty

        def get_current_target(self) -> None:
            return None

        def get_active_torch_device(self) -> str:
            return "cpu"

        def get_benchmarker(self) -> None:
            return None

    backends["cpu"] = Backend(BaseBackend, InterpretedDriver)
    here = f"{__package__}." if __package__ else ""  # this file may be run as a script
    import_module(f"{here}quick_interpreter").install()


def _serve(job: Job, script: list[list[int]] | None) -> Result:
    from vllm import LLM

    settings = None
    if job.drafter:
        settings = {
            "method": "dflash",
            "model": job.drafter,
            "num_speculative_tokens": job.num_speculative_tokens,
        } | job.speculative_config
    arguments: dict[str, Any] = dict(
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        max_num_batched_tokens=job.max_num_batched_tokens,
        max_num_seqs=job.max_num_seqs,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )
    if job.adaptive is not None:
        arguments["additional_config"] = {"dflash": {"adaptive": job.adaptive}}
    if job.device:
        from fake_device import schedule_asynchronously

        schedule_asynchronously()
    llm = LLM(job.target, speculative_config=settings, **arguments | job.engine_args)
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    runner = worker.model_runner
    recorder = _Recorder(worker, job, script) if job.drafter else None
    preempted = _record_preemptions(core.scheduler)
    requests = [job.requests.get(i, Request()) for i in range(len(job.prompts))]
    finished: dict[int, Any] = {}
    for wave in sorted({request.wave for request in requests}):
        for i, request in enumerate(requests):
            if request.wave == wave and request.follows is not None:
                before = finished[request.follows]
                job.prompts[i] = [
                    *before.prompt_token_ids,
                    *before.outputs[0].token_ids,
                    *job.prompts[i],
                ]
        _run_wave(
            llm.llm_engine, job, {i: r for i, r in enumerate(requests) if r.wave == wave}, finished
        )
    outputs = [finished.get(i) for i in range(len(requests))]
    planned = runner.speculator.attn_vllm_config.compilation_config if recorder else None
    completions = [
        [list(c.token_ids) for c in output.outputs] if output else [] for output in outputs
    ]
    return Result(
        outputs=[found[0] if found else [] for found in completions],
        drafts=recorder.drafts if recorder else [],
        speculator=_name(runner.speculator),
        draft_model=_name(getattr(runner.speculator, "model", None)),
        steps=recorder.steps if recorder else 0,
        completions=completions,
        texts=[output.outputs[0].text if output else "" for output in outputs],
        logprobs=[_logprobs(output.outputs[0]) if output else [] for output in outputs],
        cached_tokens=[output.num_cached_tokens or 0 if output else 0 for output in outputs],
        prompts=job.prompts,
        preempted=preempted,
        kv_cache_groups=len(runner.kv_cache_config.kv_cache_groups),
        work=recorder.work if recorder else [],
        decodes=recorder.decodes if recorder else [],
        is_asynchronous=core.async_scheduling and core.batch_queue is not None,
        max_model_len=runner.max_model_len,
        confidences=list(runner.speculator.draft_token_confidence_probs.shape) if recorder else [],
        attention_rows=(planned and planned.max_cudagraph_capture_size) or 0,
        profile=_profile(core.scheduler),
        adapts=getattr(core.scheduler, "adapts", False),
        cells=recorder.cells if recorder else 0,
    )


def _profile(scheduler: Any) -> dict[str, Any] | None:
    from vllm_dflash.cost_profile import GUESS

    found = getattr(getattr(scheduler, "controller", None), "profile", GUESS)
    return None if found is GUESS else asdict(found)


def _run_wave(
    engine: Any, job: Job, requests: dict[int, Request], finished: dict[int, Any]
) -> None:
    """Steps the engine until these requests are done; fills ``finished`` with their outputs."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    steps = 0
    waiting = dict(requests)
    while waiting or engine.has_unfinished_requests():
        for i, request in list(waiting.items()):
            if request.arrives <= steps:
                shared = dict(
                    temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False
                )
                sampling = (
                    shared | dict(output_kind=RequestOutputKind.FINAL_ONLY) | request.sampling
                )
                if "structured_outputs" in sampling:
                    sampling["structured_outputs"] = StructuredOutputsParams(
                        **sampling["structured_outputs"]
                    )
                engine.add_request(
                    str(i),
                    TokensPrompt(prompt_token_ids=job.prompts[i]),
                    SamplingParams(**sampling),
                )
                del waiting[i]
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
        steps += 1
        gone = [str(i) for i, request in requests.items() if request.aborted == steps]
        if gone:
            engine.abort_request(gone)


def _record_preemptions(scheduler: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    preempt = scheduler._preempt_request

    def recording(request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append((_prompt(request.request_id)[0], request.num_tokens))
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = recording
    return found


def _prompt(request_id: str) -> tuple[int, int]:
    """A request's prompt and completion: vLLM names completions of one prompt "0_3-...", "1_3-...";
    a lone one "3-..."."""
    completion, _, name = request_id.rpartition("_")
    return int(name.split("-")[0]), int(completion or 0)


def _logprobs(completion: Any) -> list[list[tuple[int, float]]]:
    return [
        [(token, found.logprob) for token, found in position.items()]
        for position in completion.logprobs or []
    ]


def _name(thing: Any) -> str | None:
    return f"{type(thing).__module__}:{type(thing).__name__}" if thing is not None else None


class _Recorder:
    """Stands before the speculator's ``propose``: notes each draft, and scripts it where there is a
    script."""

    def __init__(self, worker: Any, job: Job, script: list[list[int]] | None) -> None:
        speculator = worker.model_runner.speculator
        self.speculator, self.job, self.script, self.steps = speculator, job, script, 0
        self.drafts: list[list[Draft]] = [[] for _ in job.prompts]
        self.random = random.Random(0)
        self.work: list[Work] = []
        self.decodes: list[tuple[int, int, int]] = []
        self._counts: Counter[str] = Counter()
        run_model, logits = speculator._run_model, speculator.model.compute_logits

        def running(num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            self._counts["forwarded"] += num_tokens
            return run_model(num_tokens, *args, **kwargs)

        def ranking(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            self._counts["ranked"] += len(hidden)
            return logits(hidden, *args, **kwargs)

        speculator._run_model, speculator.model.compute_logits = running, ranking
        if job.device:
            from fake_device import install, watch_target

            watch_target(speculator, self.decodes)
            install(speculator, self._counts, graphs=job.device == "graphs")
        self.cells = 0
        if job.measured:
            from vllm_dflash.drafting.measure_v2 import _cells

            self.cells = len(list(_cells(worker)))
            self.decodes.clear()
        self.propose = speculator.propose
        speculator.propose = self

    def __call__(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._counts.clear()
        draft_tokens = self.propose(input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return draft_tokens
        k = kwargs["num_speculative_tokens"]
        self.work.append(
            Work(
                input_batch.num_reqs,
                k,
                *(self._counts[name] for name in ("forwarded", "ranked", "replayed")),
            )
        )
        # Where no draft is asked for, the buffer holds an earlier step's tokens, or none.
        if k == 0:
            return draft_tokens
        self.steps += 1
        num_drafted, num_rows = draft_tokens.shape[1], self.speculator.num_query_per_req
        num_predicting = len(self.speculator.sample_pos) // self.speculator.max_num_reqs
        for row, request in enumerate(input_batch.req_ids):
            prompt, completion = _prompt(request)
            anchor = int(self.speculator.sample_pos[row * num_predicting]) - 1
            anchor_token = int(self.speculator.input_buffers.input_ids[row * num_rows])
            self.drafts[prompt].append(
                Draft(
                    anchor,
                    anchor_token,
                    draft_tokens[row].tolist(),
                    input_batch.num_reqs,
                    completion,
                    len(self.work),
                )
            )
            if self.script and prompt % 2 == 0:
                known = (self.job.prompts[prompt] + self.script[prompt])[anchor + 1 :]
                for k, token in enumerate(known[: self.random.randint(0, num_drafted)]):
                    draft_tokens[row, k] = token
        return draft_tokens


def main() -> None:
    question, answer = map(Path, sys.argv[1:])
    use_interpreter()
    from engines import keep_frozen
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_dflash.plugin import register

    register()
    keep_frozen()
    results: list[dict[str, Any]] = []
    for raw in json.loads(question.read_text()):
        job = Job.read(raw)
        results.append(
            asdict(
                _serve(
                    job, None if job.script_from is None else results[job.script_from]["outputs"]
                )
            )
        )
        gc.collect()
        cleanup_dist_env_and_memory()
    answer.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

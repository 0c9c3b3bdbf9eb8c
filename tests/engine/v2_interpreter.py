"""Runs vLLM's V2 model runner, which needs Triton, on a CPU: its kernels go through Triton's interpreter.

The interpreter is chosen when Triton is imported and the runner when vLLM is, so these engines have a process of their own:
``run_engines(jobs)`` starts this file as a script, which reads jobs and writes what each engine drafted and put out.
Limits: about 0.1 to 0.5 s per engine step on a toy model; nothing here is fit for timing.

    pytest tests/engine/test_v2.py
"""

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One offline, greedy engine run."""

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
    """An earlier job of the same call, of the same prompts. Where given, every second prompt's drafts have their first 0 to K
    tokens (drawn at random) replaced by that job's output after recording, so that an untrained drafter's steps accept and
    reject in all lengths."""
    speculative_config: dict[str, Any] = field(default_factory=dict)
    """Further keys of vLLM's speculative config."""


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


@dataclass(frozen=True)
class Result:
    """What an engine did; lists are per prompt."""

    outputs: list[list[int]]
    drafts: list[list[Draft]]
    speculator: str | None
    draft_model: str | None
    steps: int


def run_engines(jobs: Sequence[Job], timeout_s: float = 900) -> list[Result]:
    """Runs the jobs one after the other in one new process; raises with the end of its output where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "jobs.json"), Path(scratch, "results.json")
        question.write_text(json.dumps([asdict(job) for job in jobs]))
        command = [sys.executable, "-P", __file__, str(question), str(answer)]
        with Path(scratch, "output.txt").open("w+") as output:
            try:
                ended = subprocess.run(command, cwd=scratch, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s).returncode
            except subprocess.TimeoutExpired:
                ended = f"no result after {timeout_s:.0f} s"
            if ended:
                output.seek(0)
                raise RuntimeError(f"the engine process ended with {ended}:\n{output.read()[-6000:]}")
        results = json.loads(answer.read_text())
    return [Result(**{**raw, "drafts": [[Draft(**d) for d in drafts] for drafts in raw["drafts"]]}) for raw in results]


def use_interpreter() -> None:
    """Readies this process for the V2 runner on a CPU; must come before the first import of vLLM."""
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM is already imported: it has chosen its runner. Start a process of its own")
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # One thread, pinned to no core: a toy gains nothing by more, and beside other work pinned threads wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpretedDriver(DriverBase):
        """vLLM takes Triton for absent unless a driver is active; the interpreter itself asks the driver for nothing."""

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


def _serve(job: Job, script: list[list[int]] | None) -> Result:
    from vllm import LLM, SamplingParams, TokensPrompt

    settings = None
    if job.drafter:
        settings = {"method": "dflash", "model": job.drafter, "num_speculative_tokens": job.num_speculative_tokens} | job.speculative_config
    llm = LLM(
        job.target,
        speculative_config=settings,
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        max_num_batched_tokens=job.max_num_batched_tokens,
        max_num_seqs=job.max_num_seqs,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    recorder = _Recorder(runner.speculator, job, script) if job.drafter else None
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in job.prompts],
        SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return Result(
        outputs=[list(output.outputs[0].token_ids) for output in outputs],
        drafts=recorder.drafts if recorder else [],
        speculator=_name(runner.speculator),
        draft_model=_name(getattr(runner.speculator, "model", None)),
        steps=recorder.steps if recorder else 0,
    )


def _name(thing: Any) -> str | None:
    return f"{type(thing).__module__}:{type(thing).__name__}" if thing is not None else None


class _Recorder:
    """Stands before the speculator's ``propose``: notes each draft, and scripts it where there is a script."""

    def __init__(self, speculator: Any, job: Job, script: list[list[int]] | None) -> None:
        self.speculator, self.job, self.script, self.steps = speculator, job, script, 0
        self.propose = speculator.propose
        self.drafts: list[list[Draft]] = [[] for _ in job.prompts]
        self.random = random.Random(0)
        speculator.propose = self

    def __call__(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        draft_tokens = self.propose(input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return draft_tokens
        self.steps += 1
        num_drafted = self.speculator.num_speculative_steps
        for row, request in enumerate(input_batch.req_ids):
            prompt = int(request.split("-")[0])
            anchor = int(self.speculator.sample_pos[row * num_drafted]) - 1
            anchor_token = int(self.speculator.input_buffers.input_ids[row * (num_drafted + 1)])
            self.drafts[prompt].append(Draft(anchor, anchor_token, draft_tokens[row].tolist(), input_batch.num_reqs))
            if self.script and prompt % 2 == 0:
                known = (self.job.prompts[prompt] + self.script[prompt])[anchor + 1 :]
                for k, token in enumerate(known[: self.random.randint(0, num_drafted)]):
                    draft_tokens[row, k] = token
        return draft_tokens


def main() -> None:
    question, answer = map(Path, sys.argv[1:])
    use_interpreter()
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_dflash.plugin import register

    register()
    results: list[dict[str, Any]] = []
    for raw in json.loads(question.read_text()):
        job = Job(**raw)
        results.append(asdict(_serve(job, None if job.script_from is None else results[job.script_from]["outputs"])))
        gc.collect()
        cleanup_dist_env_and_memory()
    answer.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

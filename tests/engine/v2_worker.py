"""Runs the engines of ``v2_jobs.run_engines``, one after the other, and writes what each drafted
and put out: ``v2_worker.py JOBS RESULTS``, two files of JSON.
"""

import gc
import json
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v2_interpreter import use_interpreter
from v2_jobs import Draft, Job, Request, Result, Work


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

"""Runs engines of one or more ranks and reports outputs, counters and every rank's drafts. Driven
by ``test_tensor_parallel.py``.

Like ``worker.py``, but what it asks of the workers goes through vLLM's ``collective_rpc``: they are
processes of their own.
"""

import os
import sys
from pathlib import Path
from typing import Any

from engines import answer_jobs, counters, record_drafts, start

IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
if IS_V2:  # before vLLM is imported, in each rank too: it starts with this file
    from v2_interpreter import use_interpreter

    use_interpreter()
    import torch

    # What vLLM compiles for more than one rank, the embedding's share of the vocabulary, would ask
    # the interpreter for a compiler.
    torch.compiler.set_stance("force_eager")


def start_recording(worker: Any) -> str:
    """Runs in a rank: keeps every draft from now on; returns the module of what drafts."""
    if IS_V2:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from gpu.watching import Recorder

        runner = worker.model_runner
        proposer = type(runner.speculator).__module__
        runner.recorder = Recorder(runner.speculator)
        runner.recorder.begin()
        # The way of ``use_local_argmax_reduction``, which these engines have, asks for none.
        runner.speculator.model.compute_logits = None
        return proposer
    worker.model_runner.recorded = []
    record_drafts(worker.model_runner, worker.model_runner.recorded)
    return type(worker.model_runner.drafter).__module__


def recorded(worker: Any) -> list[dict[str, Any]]:
    """Runs in a rank: what it drafted."""
    if IS_V2:
        keys = ("request", "anchor", "token", "draft")
        return [dict(zip(keys, d, strict=True)) for d in worker.model_runner.recorder.end()]
    return worker.model_runner.recorded


def top_tokens(worker: Any) -> tuple[list[int], list[int]]:
    """Runs in a rank: the best tokens of random rows, by ``use_local_argmax_reduction``'s way and
    by the logits of all ranks."""
    import torch

    runner = worker.model_runner
    model = (runner.speculator if IS_V2 else runner.drafter).model
    vars(model).pop("compute_logits", None)
    shape, made = (64, model.drafter_config.hidden_size), torch.Generator().manual_seed(1)
    with torch.inference_mode():
        hidden = torch.randn(shape, generator=made).to(model.dtype)
        return (
            model.get_top_tokens(hidden.clone()).tolist(),
            model.compute_logits(hidden.clone()).argmax(-1).tolist(),
        )


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    settings = {
        name: job[name]
        for name in ("dtype", "max_model_len", "kv_cache_memory_bytes", "speculative_config")
    }
    llm = start(job["target"], skip_tokenizer_init=True, **settings | job["engine_args"])
    drafted = job["speculative_config"] is not None
    proposers = llm.collective_rpc(start_recording) if drafted else []
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False
    )
    counted, ranks = counters(llm), llm.collective_rpc(recorded) if drafted else []
    top = llm.collective_rpc(top_tokens) if drafted else []
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "counters": counted,
        "proposers": proposers,
        "ranks": ranks,
        "top": top,
    }


if __name__ == "__main__":
    answer_jobs(run)

"""Runs real engines of one or more ranks one after the other, and reports outputs, counters and every rank's drafts, as JSON.

Like ``worker.py``, but what it asks of the workers goes through vLLM's ``collective_rpc``: they are processes of their own.
Driven by ``test_tensor_parallel.py``. Jobs come as a list on standard input, the report goes to the file named first.
"""

import gc
import json
import sys
from typing import Any


def start_recording(worker: Any) -> str:
    """Runs in a rank: keeps every draft from now on; returns the module of the proposer."""
    runner = worker.model_runner
    runner.recorded = []
    propose = runner.drafter.propose

    def recording(*args: Any, **kwargs: Any) -> Any:
        tokens = propose(*args, **kwargs)
        lengths, rejected = kwargs["common_attn_metadata"].seq_lens, kwargs["num_rejected_tokens_gpu"]
        anchors = lengths if rejected is None else lengths - rejected
        rows = zip(runner.input_batch.req_ids, anchors.tolist(), kwargs["next_token_ids"].tolist(), tokens.tolist(), strict=True)
        runner.recorded += [{"request": int(r.split("-")[0]), "anchor": n, "token": t, "draft": d} for r, n, t, d in rows]
        return tokens

    runner.drafter.propose = recording
    return type(runner.drafter).__module__


def recorded(worker: Any) -> list[dict[str, Any]]:
    """Runs in a rank: what it drafted."""
    return worker.model_runner.recorded


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["target"], skip_tokenizer_init=True, enforce_eager=True, dtype=job["dtype"], max_model_len=job["max_model_len"], seed=0,
        kv_cache_memory_bytes=job["kv_cache_memory_bytes"], max_num_seqs=16, disable_log_stats=False, generation_config="vllm",
        speculative_config=job["speculative_config"], **job["engine_args"],
    )  # fmt: skip
    drafted = job["speculative_config"] is not None
    proposers = llm.collective_rpc(start_recording) if drafted else []
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
    metrics = {m.name: m for m in llm.get_metrics()}
    counters = {
        key: metrics[f"vllm:spec_decode_num_{name}"].value
        for key, name in (("drafts", "drafts"), ("draft_tokens", "draft_tokens"), ("accepted", "accepted_tokens"))
        if drafted
    }
    ranks = llm.collective_rpc(recorded) if drafted else []
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs], "counters": counters, "proposers": proposers, "ranks": ranks}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    reports = []
    for job in json.load(sys.stdin):
        reports.append(run(job))
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(sys.argv[1], "w") as file:
        json.dump(reports, file)


if __name__ == "__main__":
    main()

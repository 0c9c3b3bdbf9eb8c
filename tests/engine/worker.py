"""Runs real vLLM engines one after the other in a process of their own and reports what they did, as JSON. Driven by ``harness.run_engines``.

Each job (a list as JSON on standard input) names the target, the drafter, the settings and the batches; the report holds the
tokens, vLLM's own speculation counters for each batch and, if asked for, every draft made inside the engine.
"""

import gc
import json
import sys
import time
from typing import Any

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
}


def record_drafts(llm: Any, drafts: list[dict[str, Any]]) -> None:
    """Wraps the V1 proposer's ``propose``: per request its index, anchor position, anchor token and drafted tokens."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    propose = runner.drafter.propose

    def recording(*args: Any, **kwargs: Any) -> Any:
        tokens = propose(*args, **kwargs)
        lengths, rejected = kwargs["common_attn_metadata"].seq_lens, kwargs["num_rejected_tokens_gpu"]
        anchors = lengths if rejected is None else lengths - rejected
        rows = zip(runner.input_batch.req_ids, anchors.tolist(), kwargs["next_token_ids"].tolist(), tokens.tolist(), strict=True)
        drafts.extend({"request": int(r.split("-")[0]), "anchor": n, "token": t, "draft": d} for r, n, t, d in rows)
        return tokens

    runner.drafter.propose = recording


def skip_drafting(llm: Any, steps: range) -> None:
    """Leaves the drafter out of these steps, counted from the first, as a bug or a race would: nothing drafted, nothing written."""
    import torch

    drafter = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    propose, count = drafter.propose, iter(range(1 << 30))

    def skipping(*args: Any, **kwargs: Any) -> Any:
        if next(count) in steps:
            return torch.zeros(len(kwargs["next_token_ids"]), kwargs["num_speculative_tokens"], dtype=torch.int64)
        return propose(*args, **kwargs)

    drafter.propose = skipping


def coverage(llm: Any) -> dict[str, int]:
    """The proposer's counts of context positions; empty for a proposer that is not ours."""
    from vllm_dflash.drafting.proposer import DFlashProposer, context_counts

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return llm.collective_rpc(context_counts)[0] if isinstance(getattr(runner, "drafter", None), DFlashProposer) else {}


def counters(llm: Any) -> dict[str, float]:
    """vLLM's speculation counters so far; ``per_position`` is a list."""
    metrics = {m.name: m for m in llm.get_metrics()}
    found = {key: metrics[name].value for key, name in COUNTERS.items() if name in metrics}
    positions = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return found | {"per_position": list(positions.values) if positions else []}


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    speculative = {"speculative_config": job["speculative_config"]} if job.get("speculative_config") else {}
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True, "enforce_eager": True, "dtype": job["dtype"], "max_model_len": job["max_model_len"],
        "kv_cache_memory_bytes": job["kv_cache_memory_bytes"], "max_num_seqs": 16, "disable_log_stats": False, "seed": 0, "generation_config": "vllm",
    }  # fmt: skip
    llm = LLM(job["target"], **settings | job["engine_args"] | speculative)
    drafts: list[dict[str, Any]] = []
    if job.get("skip_steps"):
        skip_drafting(llm, range(*job["skip_steps"]))
    if job.get("record"):
        record_drafts(llm, drafts)
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=job.get("ignore_eos", True), logprobs=job.get("logprobs"), detokenize=False
    )
    batches = []
    for size in job["batch_sizes"]:
        before, first, tokens, logprobs, seconds = counters(llm), len(drafts), [], [], 0.0
        for at in range(0, len(job["prompts"]), size):
            prompts = [{"prompt_token_ids": p} for p in job["prompts"][at : at + size]]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds += time.perf_counter() - start
            tokens += [list(o.outputs[0].token_ids) for o in outputs]
            if job.get("logprobs"):
                logprobs += [
                    [sorted((v.logprob for v in step.values()), reverse=True)[:2] for step in o.outputs[0].logprobs] for o in outputs
                ]
        after = counters(llm)
        delta = {k: after[k] - before[k] for k in after if k != "per_position"}
        delta["per_position"] = [
            a - b for a, b in zip(after["per_position"], before["per_position"] or [0] * len(after["per_position"]), strict=True)
        ]
        batches.append(
            {"size": size, "tokens": tokens, "seconds": seconds, "drafts": drafts[first:], "logprobs": logprobs, "counters": delta}
        )
    return {
        "batches": batches,
        "coverage": coverage(llm),
        "proposer": type(
            getattr(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner, "drafter", None)
        ).__module__,
    }


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

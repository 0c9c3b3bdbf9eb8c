"""What the scripts that run engines share: starting one, reaching its runner, and answering a list
of jobs. Driven by ``harness.run_worker``."""

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "seed": 0,
    "kv_cache_memory_bytes": 1 << 27,
    "disable_log_stats": False,
    "generation_config": "vllm",
}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
}


def start(model: str, **args: Any) -> Any:
    """An ``LLM`` with the tests' settings; ``args`` overrule them."""
    from vllm import LLM

    return LLM(model, **SETTINGS | args)


def model_runner(llm: Any) -> Any:
    """The model runner of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def record_drafts(runner: Any, drafts: list[dict[str, Any]]) -> None:
    """Wraps the V1 proposer's ``propose``: per request its index, anchor position, anchor token and
    drafted tokens; and ``skip``, which drafts none."""
    propose = runner.drafter.propose

    def recording(*args: Any, **kwargs: Any) -> Any:
        tokens = propose(*args, **kwargs)
        lengths, rejected = (
            kwargs["common_attn_metadata"].seq_lens,
            kwargs["num_rejected_tokens_gpu"],
        )
        anchors = lengths if rejected is None else lengths - rejected
        rows = zip(
            runner.input_batch.req_ids,
            anchors.tolist(),
            kwargs["next_token_ids"].tolist(),
            as_list(tokens),
            strict=True,
        )
        drafts.extend(
            {"request": int(r.split("-")[0]), "anchor": n, "token": t, "draft": d}
            for r, n, t, d in rows
        )
        return tokens

    runner.drafter.propose = recording
    if hasattr(runner.drafter, "skip"):
        skip, propose_step, step = runner.drafter.skip, runner.propose_draft_token_ids, {}

        def seeing_tokens(scheduled: Any, sampled_token_ids: Any, *args: Any) -> Any:
            step["tokens"] = sampled_token_ids[:, 0].tolist()
            return propose_step(scheduled, sampled_token_ids, *args)

        def recording_none(features: Any, cad: Any) -> Any:
            inside_prompt = runner.discard_request_mask.np[: cad.num_reqs].tolist()
            rows = zip(
                runner.input_batch.req_ids,
                cad.seq_lens.tolist(),
                step["tokens"],
                inside_prompt,
                strict=True,
            )
            drafts.extend(
                {"request": int(r.split("-")[0]), "anchor": n, "token": t, "draft": []}
                for r, n, t, inside in rows
                if not inside
            )
            return skip(features, cad)

        runner.drafter.skip, runner.propose_draft_token_ids = recording_none, seeing_tokens


def as_list(drafts: Any) -> list[list[int]]:
    """What a proposer drafted: ours hands out lists on a CPU, vLLM's a tensor."""
    return drafts if isinstance(drafts, list) else drafts.tolist()


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's counters so far; ``per_position`` is a list."""
    metrics = {m.name: m for m in llm.get_metrics()}
    found = {key: metrics[name].value for key, name in COUNTERS.items() if name in metrics}
    positions = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return found | {"per_position": list(positions.values) if positions else []}


def counted(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two calls of ``counters``."""
    found = {key: after[key] - before[key] for key in after if key != "per_position"}
    first = before["per_position"] or [0] * len(after["per_position"])
    return found | {
        "per_position": [b - a for a, b in zip(first, after["per_position"], strict=True)]
    }


def answer_jobs(run: Callable[[dict[str, Any]], Any]) -> None:
    """Runs each job of the list on standard input, an engine each, and writes the reports to the
    file named on the command line; where one fails, those before it are there."""
    from vllm.distributed import cleanup_dist_env_and_memory

    keep_frozen()
    reports: list[Any] = []
    for job in json.load(sys.stdin):
        try:
            reports.append(run(job))
        except BaseException:
            with open(f"{sys.argv[1]}.before", "w") as file:
                json.dump(reports, file)
            raise
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(sys.argv[1], "w") as file:
        json.dump(reports, file)


def keep_frozen() -> None:
    """Takes what is imported out of the garbage collector's sight for good: vLLM collects a dozen
    times for each engine, half a second each.

    vLLM freezes a started engine, which could then not be collected, and unfreezes everything at
    its end; neither happens from now on.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None

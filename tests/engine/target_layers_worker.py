"""Runs the target's layers twice in each step of a real engine, as vLLM's modules and by our class,
and counts what differs.

Driven by ``harness.run_worker``; each job names the target, the drafter, the dtype and the prompts.
"""

from typing import Any

import torch
from engines import answer_jobs, model_runner, start


def compare_steps(runner: Any) -> dict[str, int]:
    """From now on; ours comes first, so that a key that it does not write differs from what the
    modules write after it."""
    from vllm_dflash.cpu.target_layers import EagerTarget

    model = runner.model.model
    ours, seen = (
        model.forward,
        {
            "ours": int(isinstance(model.forward, EagerTarget)),
            "steps": 0,
            "by modules": 0,
            "rows": 0,
            "features": 0,
            "outputs differ": 0,
            "caches differ": 0,
        },
    )
    if not seen["ours"]:
        return seen

    def by_modules(*args: Any, **kwargs: Any) -> Any:
        seen["by modules"] += 1
        return type(model).forward(model, *args, **kwargs)

    ours._modules = by_modules
    caches = [layer.self_attn.attn for layer in model.layers]

    def both(*args: Any, **kwargs: Any) -> Any:
        found = ours(*args, **kwargs)
        written = [attn.kv_cache.clone() for attn in caches]
        expected = type(model).forward(model, *args, **kwargs)
        hidden, features = found
        seen["steps"] += 1
        seen["rows"] = max(seen["rows"], len(hidden))
        seen["features"] = len(features)
        pairs = zip([hidden, *features], [expected[0], *expected[1]], strict=True)
        seen["outputs differ"] += not all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
        )
        seen["caches differ"] += not all(
            torch.equal(attn.kv_cache, before) for attn, before in zip(caches, written, strict=True)
        )
        return found

    model.forward = both
    return seen


def run(job: dict[str, Any]) -> dict[str, int]:
    from vllm import SamplingParams

    llm = start(
        job["target"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        kv_cache_memory_bytes=1 << 24,
        max_num_batched_tokens=64,
        speculative_config={"method": "dflash", "model": job["drafter"]},
        additional_config={"dflash": {"adaptive": False}},
    )
    seen = compare_steps(model_runner(llm))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    for size in (1, len(job["prompts"])):
        llm.generate(
            [{"prompt_token_ids": p} for p in job["prompts"][:size]], params, use_tqdm=False
        )
    return seen


if __name__ == "__main__":
    answer_jobs(run)

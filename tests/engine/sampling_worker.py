"""Answers requests with real vLLM engines, one after the other in a process of their own, as JSON. Driven by ``sampling_harness.run``.

A request that vLLM refuses is answered with its message; the engine goes on. One that does not start answers all with its message.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from broken_rules import RULES
from worker import counters


def sampling_params(fields: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(fields)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}  # JSON has no integer keys
    return SamplingParams(**fields)


@contextmanager
def counted_drafts(llm: Any, wanted: bool) -> Iterator[dict[str, Any]]:
    """Sums, by draft position and token, how often a token was drafted, how often its probability says, and the variance of that."""
    import torch

    sums: dict[str, Any] = {}
    drafter = getattr(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner, "drafter", None)
    if not wanted:
        yield sums
        return
    propose = drafter.propose

    def counting(*args: Any, **kwargs: Any) -> Any:
        tokens, probs = propose(*args, **kwargs), drafter.take_last_draft_probs()
        if probs is None:  # all requests are greedy
            return tokens
        assert probs.shape[:2] == tokens.shape, (probs.shape, tokens.shape)
        assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-4)
        p = probs.double()
        seen = torch.nn.functional.one_hot(tokens, p.shape[-1])
        for name, value in (("seen", seen), ("expected", p), ("variance", p * (1 - p))):
            sums[name] = sums.get(name, 0) + value.sum(0)
        return tokens

    drafter.propose = counting
    yield sums
    drafter.propose = propose
    for name in list(sums):
        sums[name] = sums[name].tolist()


def completion(output: Any) -> dict[str, Any]:
    steps = output.logprobs and [{t: [v.logprob, v.rank] for t, v in step.items()} for step in output.logprobs]
    return {
        "token_ids": list(output.token_ids), "text": output.text, "finish_reason": output.finish_reason, "stop_reason": output.stop_reason,
        "logprobs": steps, "cumulative_logprob": output.cumulative_logprob,
    }  # fmt: skip


def answer(llm: Any, ask: dict[str, Any]) -> dict[str, Any]:
    from vllm.exceptions import VLLMValidationError

    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in ask["prompts"]]
    params = ask["params"]
    before, outputs, error = counters(llm), [], None
    try:
        params = sampling_params(params) if isinstance(params, dict) else [sampling_params(p) for p in params]
        with counted_drafts(llm, ask["draft_probs"]) as sums, RULES[ask["broken"]](llm):
            outputs = llm.generate(prompts, params, use_tqdm=False)
    except (ValueError, VLLMValidationError) as refusal:
        error, sums = str(refusal), {}
    after = counters(llm)
    return {
        "completions": [[completion(c) for c in o.outputs] for o in outputs],
        "prompt_logprobs": [
            o.prompt_logprobs and [step and {t: [v.logprob, v.rank] for t, v in step.items()} for step in o.prompt_logprobs] for o in outputs
        ],
        "counters": {name: after[name] - before[name] for name in after if name != "per_position"},
        "error": error,
        "draft_probs": sums or None,
    }  # fmt: skip


def answered_with(error: str) -> dict[str, Any]:
    return {"completions": [], "prompt_logprobs": [], "counters": {}, "error": error, "draft_probs": None}


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    reports = []
    for engine in json.load(sys.stdin):
        try:
            llm = LLM(**engine["args"])
        except ValueError as refusal:
            reports.append([answered_with(str(refusal)) for _ in engine["asks"]])
            continue
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        if "speculative_config" in engine["args"]:
            assert type(runner.drafter).__module__.startswith("vllm_dflash."), f"drafted by {type(runner.drafter)}"
        reports.append([answer(llm, ask) for ask in engine["asks"]])
        del llm, runner
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(sys.argv[1], "w") as file:
        json.dump(reports, file)


if __name__ == "__main__":
    main()

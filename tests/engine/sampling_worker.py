"""Answers requests with any sampling parameters. Driven by ``sampling_harness.run``.

A request that vLLM refuses is answered with its message; the engine goes on. One that does not
start answers all with its message.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from broken_rules import RULES
from engines import answer_jobs, as_list, counted, counters, model_runner, start


def sampling_params(fields: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    fields = dict(fields)
    if "repetition_detection" in fields:
        fields["repetition_detection"] = RepetitionDetectionParams(**fields["repetition_detection"])
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {
            int(token): bias for token, bias in fields["logit_bias"].items()
        }  # JSON has no integer keys
    return SamplingParams(**fields)


@contextmanager
def counted_drafts(llm: Any, wanted: bool) -> Iterator[dict[str, Any]]:
    """Sums, by draft position and token, how often a token was drafted, how often its probability
    says, and the variance of that."""
    import torch

    sums: dict[str, Any] = {}
    drafter = getattr(model_runner(llm), "drafter", None)
    if not wanted:
        yield sums
        return
    propose = drafter.propose

    def counting(*args: Any, **kwargs: Any) -> Any:
        tokens, probs = propose(*args, **kwargs), drafter.take_last_draft_probs()
        if probs is None:  # all requests are greedy
            return tokens
        drafted = torch.tensor(as_list(tokens))
        assert probs.shape[:2] == drafted.shape, (probs.shape, drafted.shape)
        assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-4)
        # A greedy request's drafts are the likeliest tokens, whatever the probabilities beside them
        # say; nothing reads those.
        sampled = kwargs["sampling_metadata"].temperature > 0
        p = probs[sampled].double()
        seen = torch.nn.functional.one_hot(drafted[sampled], p.shape[-1])
        for name, value in (("seen", seen), ("expected", p), ("variance", p * (1 - p))):
            sums[name] = sums.get(name, 0) + value.sum(0)
        return tokens

    drafter.propose = counting
    yield sums
    drafter.propose = propose
    for name in list(sums):
        sums[name] = sums[name].tolist()


def completion(output: Any) -> dict[str, Any]:
    steps = output.logprobs and [
        {t: [v.logprob, v.rank] for t, v in step.items()} for step in output.logprobs
    ]
    return {
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "logprobs": steps,
        "cumulative_logprob": output.cumulative_logprob,
    }


def answer(llm: Any, ask: dict[str, Any]) -> dict[str, Any]:
    from vllm.exceptions import VLLMValidationError

    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in ask["prompts"]]
    params = ask["params"]
    before, outputs, error = counters(llm), [], None
    try:
        params = (
            sampling_params(params)
            if isinstance(params, dict)
            else [sampling_params(p) for p in params]
        )
        with counted_drafts(llm, ask["draft_probs"]) as sums, RULES[ask["broken"]](llm):
            outputs = llm.generate(prompts, params, use_tqdm=False)
    except (ValueError, VLLMValidationError) as refusal:
        error, sums = str(refusal), {}
    return {
        "completions": [[completion(c) for c in o.outputs] for o in outputs],
        "prompt_logprobs": [
            o.prompt_logprobs
            and [
                step and {t: [v.logprob, v.rank] for t, v in step.items()}
                for step in o.prompt_logprobs
            ]
            for o in outputs
        ],
        "counters": counted(before, counters(llm)),
        "error": error,
        "draft_probs": sums or None,
    }


def answered_with(error: str) -> dict[str, Any]:
    return {
        "completions": [],
        "prompt_logprobs": [],
        "counters": {},
        "error": error,
        "draft_probs": None,
    }


def run(engine: dict[str, Any]) -> list[dict[str, Any]]:
    args = dict(engine["args"])
    try:
        llm = start(args.pop("model"), **args)
    except ValueError as refusal:
        return [answered_with(str(refusal)) for _ in engine["asks"]]
    if "speculative_config" in args:
        drafter = model_runner(llm).drafter
        assert type(drafter).__module__.startswith("vllm_dflash."), f"drafted by {type(drafter)}"
    return [answer(llm, ask) for ask in engine["asks"]]


if __name__ == "__main__":
    answer_jobs(run)

"""Runs engines over batches of prompts, greedy unless asked otherwise, and reports what they did.
Driven by ``harness.run_engines``.

Each job names the target, the drafter, the settings and the batches; the report holds the tokens,
vLLM's own counters for each batch and, if asked for, every draft made inside the engine.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from engines import answer_jobs, counted, counters, model_runner, record_drafts, start


def skip_drafting(llm: Any, steps: range) -> None:
    """Leaves the drafter out of these steps, counted from the first, as a bug or a race would:
    nothing drafted, nothing written."""
    import torch

    drafter = model_runner(llm).drafter
    propose, count = drafter.propose, iter(range(1 << 30))

    def skipping(*args: Any, **kwargs: Any) -> Any:
        if next(count) in steps:
            return torch.zeros(
                len(kwargs["next_token_ids"]), kwargs["num_speculative_tokens"], dtype=torch.int64
            )
        return propose(*args, **kwargs)

    drafter.propose = skipping


class Verifications:
    """An observer of steps: of each verified draft its request's index, its anchor, and how many of
    its tokens were verified and accepted."""

    what = "a test"

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int, int]] = []

    def observe(self, step: Any) -> None:
        for request_id, (verified, accepted) in step.verified.items():
            request = step.requests[request_id]
            if not request.is_finished():  # else its last tokens may have been cut
                # Its last token is the step's own, and follows those that were accepted.
                anchor = request.num_tokens - accepted - 2
                self.found.append((int(request_id.split("-")[0]), anchor, verified, accepted))

    def close(self) -> None:
        """Nothing is open."""


def slow_drafts(scheduler: Any, factor: float) -> None:
    """Drafts seem to the controller to take ``factor`` times as long as they were measured at the
    warm-up, and steps that draft ``factor`` times as long as they were."""
    from vllm_dflash.adaptive.cost import StepCost

    controller = scheduler.controller
    slower = tuple(factor * seconds for seconds in controller.profile.draft)
    controller.profile = replace(controller.profile, draft=slower)
    controller.cost = StepCost(controller.profile, controller.tuning)
    observe = controller.observe

    def observing(work: Any, seconds: float, *args: Any) -> None:
        drafts = work is not None and work.draft_rows
        observe(work, seconds * (factor if drafts else 1.0), *args)

    controller.observe = observing


def skip_requests(scheduler: Any, skipped: set[int]) -> None:
    """The controller drafts nothing for these requests of a batch, in every third step nothing for
    any, and else whole drafts for the others."""
    from vllm_dflash.adaptive.controller import Plan

    controller, step = scheduler.controller, iter(range(1 << 30))
    size = 1 + max(skipped)

    def plan(requests: Any) -> Any:
        if next(step) % 3 == 2:
            return Plan(0)
        out = frozenset(name for name in requests if int(name.split("-")[0]) % size in skipped)
        return Plan(controller.max_draft, -1.0, skipped=out)

    controller.plan, controller.kept_plan = plan, lambda num_reqs: None


def coverage(llm: Any) -> dict[str, int]:
    """The proposer's counts of context positions; empty for a proposer that is not ours."""
    from vllm_dflash.drafting.v1 import DFlashProposer, context_counts

    return (
        llm.collective_rpc(context_counts)[0]
        if isinstance(getattr(model_runner(llm), "drafter", None), DFlashProposer)
        else {}
    )


def as_embeddings(
    target: str, prompts: list[dict[str, Any]], which: Sequence[bool]
) -> list[dict[str, Any]]:
    """The prompts, of which some as the target embeds them, without their token ids."""
    from safetensors import safe_open

    with safe_open(f"{target}/model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight").float()
    return [
        {"prompt_embeds": table[prompt["prompt_token_ids"]]} if embedded else prompt
        for prompt, embedded in zip(prompts, which, strict=True)
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    speculative = (
        {"speculative_config": job["speculative_config"]} if job["speculative_config"] else {}
    )
    settings = {name: job[name] for name in ("dtype", "max_model_len", "kv_cache_memory_bytes")}
    llm = start(
        job["target"], skip_tokenizer_init=True, **settings | job["engine_args"] | speculative
    )
    drafts: list[dict[str, Any]] = []
    if job.get("skip_steps"):
        skip_drafting(llm, range(*job["skip_steps"]))
    if job.get("record"):
        record_drafts(model_runner(llm), drafts)
    verified = Verifications()
    if job.get("slow_drafts") or job.get("skip_requests"):
        from vllm_dflash.patches.scheduler_steps import watch

        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        if job.get("slow_drafts"):
            slow_drafts(scheduler, job["slow_drafts"])
        else:
            skip_requests(scheduler, set(job["skip_requests"]))
        watch(scheduler, verified)
    asked = dict(
        temperature=0,
        ignore_eos=job.get("ignore_eos", True),
        logprobs=job.get("logprobs"),
        detokenize=False,
    )
    most, sampling = job["max_tokens"], job.get("sampling", {})
    lengths = [most] * len(job["prompts"]) if isinstance(most, int) else most
    # Of a list each prompt has the next, and the first again after the last.
    params = [
        SamplingParams(**{"max_tokens": length} | asked | each)
        for length, each in zip(
            lengths, cycle(sampling if isinstance(sampling, list) else [sampling])
        )
    ]
    batches = []
    for size in job["batch_sizes"]:
        before, first, tokens, logprobs, seconds = counters(llm), len(drafts), [], [], 0.0
        first_verified = len(verified.found)
        for at in range(0, len(job["prompts"]), size):
            prompts = [{"prompt_token_ids": p} for p in job["prompts"][at : at + size]]
            if which := job.get("as_embeddings"):
                prompts = as_embeddings(job["target"], prompts, which[at : at + size])
            began = time.perf_counter()
            outputs = llm.generate(prompts, params[at : at + size], use_tqdm=False)
            seconds += time.perf_counter() - began
            tokens += [list(o.outputs[0].token_ids) for o in outputs]
            if job.get("logprobs"):
                logprobs += [
                    [
                        sorted((v.logprob for v in step.values()), reverse=True)[:2]
                        for step in o.outputs[0].logprobs
                    ]
                    for o in outputs
                ]
        delta = counted(before, counters(llm))
        batches.append(
            {
                "size": size,
                "tokens": tokens,
                "seconds": seconds,
                "drafts": drafts[first:],
                "verified": verified.found[first_verified:],
                "logprobs": logprobs,
                "counters": delta,
            }
        )
    return {
        "batches": batches,
        "coverage": coverage(llm),
        "proposer": type(getattr(model_runner(llm), "drafter", None)).__module__,
    }


if __name__ == "__main__":
    answer_jobs(run)

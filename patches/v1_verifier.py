"""V1 runner on a CPU: drafts are verified by our class."""

from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Any, runner: Any) -> Any:
    from vllm_dflash.cpu.verification import Verifier

    return Verifier(runner)


_SAMPLER = "vllm.v1.sample.sampler:Sampler"

PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.rejection_sampler",
    scope="instance",
    fingerprints={
        "vllm.v1.sample.rejection_sampler:RejectionSampler": {
            "0.32": "0bb8ee778a234b05",
            "0.33": "dc9fae9a01bc96eb",
        },
        f"{_SAMPLER}.forward": {"0.32": "847fa4891f371cc1", "0.33": "750bf02ebb5cdc6a"},
        f"{_SAMPLER}.sample": "625f4ecf887dbb65",
        f"{_SAMPLER}.apply_temperature": "d5979982c65db184",
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu": "c376bd9c774bf704",
        f"{_SAMPLER}.apply_logits_processors": "d807d7d0cf6f6d5c",
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor": "90e79f6a2eeb8c69",
        f"{_SAMPLER}.gather_specific_token_logprobs": "da1f2be0d8510e1e",
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": "27f616101821bc71",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "2a9fd2c519c76bcc",
    },
    signatures={
        f"{_SAMPLER}.greedy_sample": "logits",
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": "logits, k, p, ...",
    },
    # Below which a temperature is greedy.
    names=("vllm.v1.sample.sampler:_SAMPLING_EPS",),
    why=(
        "the target's own token is sampled at every row, and the drafts that are equal to it are"
        " kept: one pass over the logits, and a seed gives what it gives without a drafter. The"
        " runner makes its sampler itself, and nothing names another"
    ),
    until="vLLM lets a plug-in name the rejection sampler",
    replace=_replace,
)

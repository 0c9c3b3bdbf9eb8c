"""V1 runner: a step that verifies no drafts leaves sampling settings alone, where a top-k request
ended the engine."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import CPU_FIXES, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_sampling_constraints(
        logits: Any, cu_num_draft_tokens: Any, sampling_metadata: Any
    ) -> Any:
        # A prompt's step has no drafts yet: no rows, and the maximum of no top-k is an error.
        return original(logits, cu_num_draft_tokens, sampling_metadata) if len(logits) else logits

    return apply_sampling_constraints


PATCH = Patch(
    target="vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    signatures={
        "vllm.v1.sample.rejection_sampler:apply_sampling_constraints": (
            "logits, cu_num_draft_tokens, sampling_metadata"
        )
    },
    looked_up={
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": ("apply_sampling_constraints",)
    },
    why=(
        "the runner sends every step through the rejection sampler, also one without drafts, such"
        " as a prompt's; there a batch of requests with top_k but no top_p takes the maximum of an"
        " empty tensor, which ends the CPU engine; no hook is asked"
    ),
    until="vLLM's apply_top_k_only returns empty logits as they are",
    replace=_replace,
    switch=CPU_FIXES,
)

"""V1 runner: whether a step fits the drafter is asked of each request, not of the batch's
longest."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch


def _input_fits_in_drafter(
    original: Callable[..., bool], self: Any, common_attn_metadata: Any
) -> bool:
    """Our proposer cuts a block that would reach past ``max_model_len``: every step fits."""
    return common_attn_metadata is not None


PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter",
    fingerprints={
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": "b1c3fee24b775362"
    },
    names=("vllm.v1.worker.gpu_model_runner:GPUModelRunner.speculative_config",),
    why=(
        "the original compares the batch's longest sequence plus a block with the drafter's limit;"
        " where it does not fit, no request of the batch gets its context K/V written in that step,"
        " and K zeros are scheduled as drafts; no hook is asked"
    ),
    until="vLLM asks the proposer, or decides per request",
    replace=instead(_input_fits_in_drafter, "speculative_config"),
)

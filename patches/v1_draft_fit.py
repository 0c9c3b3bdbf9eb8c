"""V1 runner: whether a step fits the drafter is asked of each request, not of the batch's
longest."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(original)
    def input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        if getattr(getattr(self, "drafter", None), "bounds_each_block", False):
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return input_fits_in_drafter


PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter",
    fingerprints={
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": "b1c3fee24b775362"
    },
    why=(
        "the original compares the batch's longest sequence plus a block with the drafter's limit;"
        " where it does not fit, no request of the batch gets its context K/V written in that step,"
        " and K zeros are scheduled as drafts; no hook is asked"
    ),
    until="vLLM asks the proposer, or decides per request",
    replace=_replace,
)

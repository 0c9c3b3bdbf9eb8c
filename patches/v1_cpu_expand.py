"""V1 runner on a CPU: each draft token is verified with its own request's temperature, top-k and
top-p."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import CPU_FIXES, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(
            counts, output_size=num_tokens
        )

    return expand_batch_to_tokens


PATCH = Patch(
    # Not the kernel's stand-in itself: vLLM copies that into a registry, and this name is looked up
    # at each call.
    target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
    fingerprints={"vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": "c1ed72c65a78f3ed"},
    looked_up={
        "vllm.v1.sample.rejection_sampler:apply_sampling_constraints": ("expand_batch_to_tokens",)
    },
    why=(
        "the CPU's stand-in for the kernel writes an int64 copy and drops it, so temperature, top-k"
        " and top-p of every draft token are whatever the memory held: sampled output is not the"
        " target's, with any drafter (vLLM issue 55005); no hook is asked"
    ),
    until="vLLM's issue 55005 is closed",
    replace=_replace,
    switch=CPU_FIXES,
)

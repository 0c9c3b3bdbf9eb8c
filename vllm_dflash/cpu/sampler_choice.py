"""Which sampler vLLM itself would run, where drafts are verified as it samples; asked once an
engine. The layers' choices, which are optional, are in ``dispatch.py``.

    pytest tests/unit/test_dispatch.py tests/engine/test_edited_vllm.py
"""

from typing import Any

from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from vllm_dflash.config import DrafterConfigError


def named(found: Any) -> str:
    """A function or class, for a message."""
    return getattr(found, "__qualname__", repr(found))


def check_sampler(sampler: Any) -> None:
    """Raises ``DrafterConfigError`` where a runner's sampler is not vLLM's: verification repeats
    how it samples."""
    replaced = [getattr(sampler, name) for name in ("forward", "sample") if name in vars(sampler)]
    if replaced or type(sampler) is not Sampler:
        found = next(iter(replaced), type(sampler))
        raise DrafterConfigError(
            f"the runner's sampler is {named(found)}, not vLLM's, and drafts are verified on a CPU"
            " as vLLM's samples",
            "serve without a drafter, or without the plug-in that replaces it",
        )


def draws_by_kernel(sampler: Any) -> bool:
    """Whether vLLM's sampler for random requests is the CPU's kernel, which takes one number of a
    request's generator for a token. It is not on POWERPC and RISC-V."""
    return (
        type(sampler) is TopKTopPSampler
        and getattr(sampler.forward, "__func__", None) is TopKTopPSampler.forward_cpu
        and not sampler.use_fp64_gumbel
    )

"""Which sampler vLLM itself would run, where drafts are verified as it samples; asked once an
engine. The layers' choices, which are optional, are in ``dispatch.py``.

    pytest tests/unit/test_dispatch.py tests/engine/test_other_choices.py
"""

from typing import Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.replaced import shadowed

_METHODS = frozenset(name for name, value in vars(Sampler).items() if callable(value)) | {
    name for name, value in vars(Sampler).items() if isinstance(value, staticmethod)
}


def named(found: Any) -> str:
    """A function or class, for a message."""
    return getattr(found, "__qualname__", repr(found))


def check_sampler(sampler: Any) -> None:
    """Raises ``DrafterConfigError`` where a runner's sampler is not vLLM's: verification repeats
    how it samples."""
    found = None
    if type(sampler) is not Sampler:
        found = named(type(sampler))
    elif (own := shadowed(sampler)) is not None:
        found = f"given another {own}, {named(getattr(sampler, own))}"
    elif not is_as_checked(sampler):
        found = "called by another than torch's __call__, or has hooks"
    if found is not None:
        raise DrafterConfigError(
            f"the runner's sampler is {found}, not vLLM's, and drafts are verified on a CPU as"
            " vLLM's samples",
            "serve without a drafter, or without the plug-in that replaces it",
        )


def is_as_checked(sampler: Any) -> bool:
    """Whether nothing was put around a sampler's methods, or listens to it, since ``check_sampler``
    passed; for each step."""
    drawn_by = sampler.topk_topp_sampler
    return not (
        sampler._forward_hooks
        or sampler._forward_pre_hooks
        or drawn_by._forward_hooks
        or drawn_by._forward_pre_hooks
        or vars(sampler).keys() & _METHODS
        or type(sampler).__call__ is not torch.nn.Module.__call__
    )


def draws_by_kernel(sampler: Any) -> bool:
    """Whether vLLM's sampler for random requests is the CPU's kernel, which takes one number of a
    request's generator for a token. It is not on POWERPC and RISC-V."""
    return (
        type(sampler) is TopKTopPSampler
        and getattr(sampler.forward, "__func__", None) is TopKTopPSampler.forward_cpu
        and not sampler.use_fp64_gumbel
    )

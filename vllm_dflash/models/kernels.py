"""Refuses a quantized drafter for which vLLM's build has no kernel on this processor; vLLM itself
finds out in the first forward.

pytest tests/engine/test_formats.py -k quantized
"""

import torch
from torch import nn
from vllm.platforms import current_platform

from vllm_dflash.errors import DrafterConfigError


def check_kernels(model: nn.Module) -> None:
    """Looks at the kernels that vLLM chose for a drafter's linear layers.

    Raises:
        DrafterConfigError: 4-bit weights on a CPU whose build lacks the kernel for them.
    """
    if not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    for name, module in model.named_modules():
        holder = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        if isinstance(getattr(holder, "kernel", None), CPUWNA16LinearKernel):
            raise DrafterConfigError(
                f"the drafter's {name} has 4-bit weights, for which vLLM has no kernel on this"
                " processor (it needs AVX-512): serve a drafter with 16-bit weights here"
            )

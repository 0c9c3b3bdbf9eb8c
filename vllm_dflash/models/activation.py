"""SwiGLU for the drafter as one kernel on a CPU, where vLLM's own runs as two operators on x86 unless it is compiled.

pytest tests/engine/test_draft_parity.py
"""

import torch
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul as VLLMSiluAndMul


class SiluAndMul(VLLMSiluAndMul):
    """As vLLM's: gate and up [N, 2 * I] -> [N, I] in the model's dtype, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        torch.ops._C.silu_and_mul(out, x.contiguous())
        return out

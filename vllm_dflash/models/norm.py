"""RMSNorm for the drafter as one kernel on a CPU, where vLLM's own runs as seven small operators
unless it is compiled.

The target keeps vLLM's: it has to write what it writes without a drafter, to the last bit
(docs/log.md).

    pytest tests/engine/test_draft_parity.py
"""

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm


class ServedRMSNorm(RMSNorm):
    """As vLLM's: ``x`` [..., H] in the model's dtype; with a residual both are returned, summed
    first, in place on a CPU.

    Its name is no name of vLLM's: another plug-in's class for ``RMSNorm`` would be made in place of
    it, without its constructor's call.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x, residual)
        # The kernel takes rows for adjacent: the keys of one head a rank are a strided part of a
        # wider row.
        x = x.contiguous()
        if residual is not None:
            ops.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
            return x, residual
        out = torch.empty_like(x)
        ops.rms_norm(out, x, self.weight.data, self.variance_epsilon)
        return out

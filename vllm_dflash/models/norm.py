"""RMSNorm as one kernel on a CPU, where vLLM's own runs as seven small operators unless it is compiled.

The drafter's norms are it in every dtype. The target's are it in float32 alone, through vLLM's own registry of implementations: in
16 bits the kernel rounds once where vLLM rounds twice, and the target has to write what it writes without a drafter.

    pytest tests/engine/test_draft_parity.py tests/engine/test_lossless.py
"""

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import ir
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm as VLLMRMSNorm

_PROVIDER = "vllm_dflash"


class RMSNorm(VLLMRMSNorm):
    """As vLLM's: ``x`` [..., H] in the model's dtype; with a residual both are returned, summed first, in place on a CPU."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x, residual)
        if residual is not None:
            ops.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
            return x, residual
        return _rms_norm(x, self.weight.data, self.variance_epsilon)


def use_for_target(vllm_config: VllmConfig) -> None:
    """Makes it the engine's first choice for float32 on a CPU; not where norms are compiled, which fuses them better."""
    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return
    if _PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(_PROVIDER, supports_args=_is_plain)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_is_plain_add, inplace=True)(_fused_add_rms_norm)
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        op.set_default([_PROVIDER, *(name for name in op.get_priority() if name != _PROVIDER)])


def _is_plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return x.dtype == torch.float32 and weight is not None and weight.dtype == x.dtype and variance_size is None and x.is_contiguous()


def _is_plain_add(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _is_plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    ops.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ops.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual

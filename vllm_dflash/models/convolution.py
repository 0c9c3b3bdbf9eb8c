"""The convolution over a block's rows, as vLLM runs it; ``reference/convolution.py`` says what it
is.

pytest tests/unit/test_convolution.py tests/engine/test_formats.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_dflash.config import DrafterConfig


class BlockConvolution(nn.Module):
    """Over N rows, block after block; whole on every rank."""

    def __init__(self, config: DrafterConfig, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.taps, hidden = config.conv_kernel_size, config.hidden_size
        self.shape = self.taps, hidden // config.conv_group_size, config.conv_group_size
        self.base_kernel = nn.Parameter(
            torch.empty(2, self.taps, hidden, dtype=dtype), requires_grad=False
        )
        self.kernel_projection = ReplicatedLinear(
            hidden,
            2 * self.taps * self.shape[1],
            bias=False,
            params_dtype=dtype,
            prefix=f"{prefix}.kernel_projection",
            return_bias=False,
        )

    def before(self, x: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [N, H] for the sublayer, and kernels [N, taps, groups] for what it returns;
        ``reach`` from ``rows_in_reach``."""
        own = self.kernel_projection(x).view(-1, 2, *self.shape[:2])
        return self._convolve(x, own[:, 0], 0, reach), own[:, 1]

    def after(self, x: Tensor, own: Tensor, reach: Tensor) -> Tensor:
        """``x`` [N, H] from the sublayer."""
        return self._convolve(x, own, 1, reach)

    def _convolve(self, x: Tensor, own: Tensor, side: int, reach: Tensor) -> Tensor:
        kernels = own.float()[..., None] + self.base_kernel[side].float().view(self.shape)
        rows = x.float().view(-1, *self.shape[1:])
        out = kernels[:, 0] * rows
        for tap in range(1, self.taps):
            # The last rows come in front, and are out of reach there. Never times zero: rows that
            # stand for nothing may hold NaN.
            earlier = kernels[:, tap] * rows.roll(tap, 0)
            out = out + torch.where(reach[:, tap, None, None], earlier, 0.0)
        return out.view(x.shape).to(x.dtype)


def rows_in_reach(positions: Tensor, block_size: int, taps: int) -> Tensor:
    """Whether the row ``tap`` before each row is of its block, bool [N, taps].

    Rows in front of a block that was moved to end at ``max_model_len`` are none of it: they stand
    at its anchor's position.

    Args:
        positions: [N] int64, ``block_size`` rows a request.
    """
    row = torch.arange(positions.shape[0], device=positions.device) % block_size
    return torch.stack(
        [(row >= tap) & (positions - positions.roll(tap, 0) == tap) for tap in range(taps)], dim=1
    )


def convolutions(config: DrafterConfig, dtype: torch.dtype, prefix: str) -> tuple[Any, Any]:
    """A layer's two, around attention and around the MLP; None each where the drafter has none."""
    if not config.conv_kernel_size:
        return None, None
    return (
        BlockConvolution(config, dtype, f"{prefix}.attention_conv"),
        BlockConvolution(config, dtype, f"{prefix}.mlp_conv"),
    )

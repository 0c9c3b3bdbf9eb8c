"""DFlash2's convolution over the rows of a block, before and after each attention and MLP.

pytest tests/unit/test_convolution.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig


class BlockConvolution(nn.Module):
    """Row t becomes ``sum_j k[t, j] * x[t - j]`` over rows of its block; a kernel is a learned one
    a channel plus one a group of channels from the row itself. It begins as no change."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.taps, hidden = config.conv_kernel_size, config.hidden_size
        self.groups = hidden // config.conv_group_size
        first = torch.zeros(2, self.taps, hidden)
        first[:, 0] = 1
        self.base_kernel = nn.Parameter(first)
        self.kernel_projection = nn.Linear(hidden, 2 * self.taps * self.groups, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def before(self, x: Tensor, block_size: int | None) -> tuple[Tensor, Tensor]:
        """What goes into a sublayer, of ``x`` [B, Q, H], and the kernels for what comes out of it;
        every ``block_size`` rows are a block, None: all."""
        own = self.kernel_projection(x).unflatten(-1, (2, self.taps, self.groups))
        return self._convolve(x, own[..., 0, :, :], 0, block_size), own[..., 1, :, :]

    def after(self, x: Tensor, own: Tensor, block_size: int | None) -> Tensor:
        """The same of what came out of it, by the kernels from ``before``."""
        return self._convolve(x, own, 1, block_size)

    def _convolve(self, x: Tensor, own: Tensor, side: int, block_size: int | None) -> Tensor:
        size = block_size or x.shape[1]
        by_channel = own.float().repeat_interleave(x.shape[-1] // self.groups, dim=-1)
        kernels = by_channel + self.base_kernel[side].float()
        blocks, out = x.float().unflatten(1, (-1, size)), torch.zeros_like(x, dtype=torch.float32)
        for tap in range(self.taps):
            earlier = F.pad(blocks, (0, 0, tap, 0))[:, :, :size].flatten(1, 2)
            out = out + kernels[..., tap, :] * earlier
        return out.to(x.dtype)

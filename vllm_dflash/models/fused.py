"""What the served contexts of DFlash, DFlare and DFly have in common: features that are fused and
normed, at full width on every rank, and projections of them for this rank's heads.

pytest tests/unit/test_kinds.py tests/engine/test_formats.py tests/engine/test_reload.py
"""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.parameters import (
    ServedContext,
    capture_order,
    in_parts,
    load_into,
    of_layer,
    own_heads,
)


class FusedContext(ServedContext):
    """Features that are fused, by ``fc`` or by shares, and then normed."""

    fc: Any
    share: nn.Parameter

    def __init__(
        self,
        config: DrafterConfig,
        num_kv_heads: int,
        dtype: torch.dtype,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        from vllm_dflash.models.norm import ServedRMSNorm

        self.config, self.num_kv_heads = config, num_kv_heads
        self.quantized = quant_config is not None
        """Whether the draft layers' projections are: packed weights cannot be stacked."""
        self.hidden_norm = ServedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make(dtype, prefix)

    def make(self, dtype: torch.dtype, prefix: str) -> None:
        """Makes all else that has weights."""
        raise NotImplementedError

    def make_fc(self, dtype: torch.dtype, prefix: str) -> None:
        """Makes ``fc``, a layer of vLLM's: all of a token's features [T * H] -> [H]."""
        from vllm.model_executor.layers.linear import ReplicatedLinear

        config = self.config
        self.fc = ReplicatedLinear(
            config.num_features * config.hidden_size,
            config.hidden_size,
            bias=False,
            params_dtype=dtype,
            prefix=f"{prefix}.fc",
            return_bias=False,
        )

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes one of the fusion's tensors, its features in the order that they come in; others
        are not needed."""
        order = capture_order(self.config)
        if name == "fc.weight":
            by_feature = tensor.unflatten(1, (self.config.num_features, -1))
            load_into(self.fc.weight, by_feature[:, order].flatten(1))
        elif name == "layer_fusion_weights":
            # The shares do not depend on the input: the softmax is taken once.
            load_into(self.share, tensor.float().softmax(dim=1)[:, order])
        elif name == "hidden_norm.weight":
            load_into(self.hidden_norm.weight, tensor)


class LayeredContext(FusedContext):
    """One context vector a draft layer, [N, D * H]; all layers' projections are one batched
    GEMM."""

    projections = "k_proj", "v_proj"
    """Of each draft layer's attention: those of the context's keys and of its values."""

    def make(self, dtype: torch.dtype, prefix: str) -> None:
        config, kv_size = self.config, self.num_kv_heads * self.config.head_dim
        depth = config.num_hidden_layers
        self.share = nn.Parameter(
            torch.empty(depth, config.num_features, dtype=dtype), requires_grad=False
        )
        if not self.quantized:
            self.weight, self.bias = (
                in_parts(nn.Parameter(tensor, requires_grad=False))
                for tensor in (
                    torch.empty(depth, config.hidden_size, 2 * kv_size, dtype=dtype),
                    torch.zeros(depth, 1, 2 * kv_size, dtype=dtype),
                )
            )

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order: the fusion's, and the
        draft layers' projections of it."""
        layer, module, kind = of_layer(name)
        if module not in self.projections or kind not in ("weight", "bias"):
            super().load(name, tensor)
        elif not self.quantized:
            size = self.num_kv_heads * self.config.head_dim
            part = slice(size) if module == self.projections[0] else slice(size, None)
            own = own_heads(tensor, self.config, self.num_kv_heads)
            load_into(
                getattr(self, kind),
                own.T if kind == "weight" else own[None],
                (layer, slice(None), part),
            )

    def mixed(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> each draft layer's share of them [N, D, H]."""
        config = self.config
        return self.share @ features.view(-1, config.num_features, config.hidden_size)

    def normed(self, fused: Tensor) -> Tensor:
        """``fused`` [N, D, H] -> context [N, D * H]."""
        hidden = self.config.hidden_size
        normed: Tensor = self.hidden_norm(fused.view(-1, hidden))
        return normed.view(-1, self.config.num_hidden_layers * hidden)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, D * H] -> keys and values [N, D, kv heads, head_dim], before k_norm and
        rotary."""
        config = self.config
        shape = config.num_hidden_layers, -1, 2, self.num_kv_heads, config.head_dim
        by_layer = context.view(-1, config.num_hidden_layers, config.hidden_size).transpose(0, 1)
        if self.quantized:
            each = [
                a.qkv_proj(own.contiguous())[0][:, a.q_size :]
                for a, own in zip(self.attentions, by_layer, strict=True)
            ]
            kv = torch.stack(each).view(shape)
        else:
            kv = torch.baddbmm(self.bias, by_layer, self.weight).view(shape)
        return kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)

"""DFlash's context: one vector a token, which all layers project; served in one GEMM.

pytest tests/unit/test_reference.py tests/engine/test_draft_parity.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.fused import FusedContext
from vllm_dflash.models.parameters import in_parts, load_into, of_layer, own_heads
from vllm_dflash.reference.drafter import Drafter, RMSNorm


class Reference(Drafter):
    """The drafter in plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(
            config.num_features * config.hidden_size, config.hidden_size, bias=False
        )
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context(self, features: Tensor) -> Tensor:
        """``features`` [..., T * H] -> c [..., H]."""
        return self.hidden_norm(self.fc(features))

    def layer_key_value(
        self, index: int, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.layers[index].self_attn.key_value(c, cos, sin)


class Served(FusedContext):
    """The same on vLLM's layers."""

    def make(self, dtype: torch.dtype, prefix: str) -> None:
        self.make_fc(dtype, prefix)
        if self.quantized:
            return
        from vllm.model_executor.layers.linear import ReplicatedLinear

        # A layer of vLLM's, so that its weight is packed as the platform likes it.
        self.proj = ReplicatedLinear(
            self.config.hidden_size,
            2 * self.config.num_hidden_layers * self.num_kv_heads * self.config.head_dim,
            bias=self.config.attention_bias,
            params_dtype=dtype,
            prefix=f"{prefix}.proj",
            return_bias=False,
        )
        for name, parameter in list(self.proj.named_parameters()):
            # In place of that with vLLM's loader, which takes whole tensors.
            self.proj.register_parameter(
                name, in_parts(nn.Parameter(parameter.data, requires_grad=False))
            )

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order: the fusion's, and the
        draft layers' keys and values."""
        layer, module, kind = of_layer(name)
        if module not in ("k_proj", "v_proj"):
            super().load(name, tensor)
        elif not self.quantized:
            size = self.num_kv_heads * self.config.head_dim
            start = (layer + (module == "v_proj") * self.config.num_hidden_layers) * size
            load_into(
                getattr(self.proj, kind),
                own_heads(tensor, self.config, self.num_kv_heads),
                slice(start, start + size),
            )

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, H]."""
        return self.hidden_norm(self.fc(features))

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, H] -> keys and values [N, D, kv heads, head_dim] of all draft layers,
        before k_norm and rotary."""
        heads = self.num_kv_heads, self.config.head_dim
        if self.quantized:
            each = [a.qkv_proj(context)[0][:, a.q_size :] for a in self.attentions]
            kv = torch.stack([e.view(-1, 2, *heads) for e in each], dim=2)
        else:
            kv = self.proj(context).view(-1, 2, self.config.num_hidden_layers, *heads)
        return kv[:, 0], kv[:, 1]

    def fast(self) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """``combine`` and ``project`` in one, kernel by kernel; None for weights packed
        otherwise."""
        from vllm_dflash.cpu.dispatch import is_cpu_linear
        from vllm_dflash.cpu.layers import Linear, live

        if self.quantized or not (is_cpu_linear(self.fc) and is_cpu_linear(self.proj)):
            return None
        rms_norm = torch.ops._C.rms_norm.default
        fc, proj = Linear(self.fc), Linear(self.proj)
        norm, eps = live(self.hidden_norm), self.hidden_norm.variance_epsilon
        config = self.config
        shape = -1, 2, config.num_hidden_layers, self.num_kv_heads, config.head_dim

        def project(features: Tensor) -> tuple[Tensor, Tensor]:
            context = fc(features)
            rms_norm(context, context, norm["weight"], eps)
            keys, values = proj(context).view(shape).unbind(1)
            return keys, values

        return project

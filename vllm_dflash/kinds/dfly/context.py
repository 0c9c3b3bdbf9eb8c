"""DFly's context: DFlash's one vector, and each draft layer's own mixture of target layers on top.

Served, all layers' projections are one batched GEMM.

    pytest tests/unit/test_kinds.py tests/engine/test_formats.py
"""

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.models.fused import LayeredContext
from vllm_dflash.reference.drafter import Drafter, RMSNorm

_STEP = 2.0
"""What a fusion logit loses with each target layer further from the draft layer's own depth, at
first (AngelSpec's released code)."""


class Reference(Drafter):
    """The drafter in plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        depth, features = config.num_hidden_layers, config.num_features
        self.fc = nn.Linear(features * config.hidden_size, config.hidden_size, bias=False)
        own = torch.tensor([round(d / max(depth - 1, 1) * (features - 1)) for d in range(depth)])
        away = (torch.arange(features) - own[:, None]).abs()
        self.layer_fusion_weights = nn.Parameter(-_STEP * away)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context(self, features: Tensor) -> Tensor:
        """``features`` [..., T * H] -> one context vector a draft layer, [..., D, H]."""
        each = features.unflatten(-1, (self.config.num_features, self.config.hidden_size))
        share = self.layer_fusion_weights.float().softmax(dim=1).to(features.dtype)
        mixed = torch.einsum("...th,dt->...dh", each, share)
        return self.hidden_norm(self.fc(features)[..., None, :] + mixed)

    def layer_key_value(
        self, index: int, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.layers[index].self_attn.key_value(c[..., index, :], cos, sin)


class Served(LayeredContext):
    """The same for vLLM."""

    def make(self, dtype: torch.dtype, prefix: str) -> None:
        self.make_fc(dtype, prefix)
        super().make(dtype, prefix)

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, D * H]."""
        return self.normed(self.mixed(features) + self.fc(features)[:, None])

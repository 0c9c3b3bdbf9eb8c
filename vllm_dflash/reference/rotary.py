"""Rotary positions in plain PyTorch, with the scalings of the published configs, by transformers'
own formulas.

    pytest tests/engine/test_formats.py -k "yarn or rope"
"""

import torch
from torch import Tensor

from vllm_dflash.config import DrafterConfig


def rotary_angles(config: DrafterConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., 1, head_dim], of integer ``positions`` [...]; the 1 broadcasts
    over heads."""
    frequencies, scale = _frequencies(config, positions.device)
    angles = positions.float()[..., None, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def _frequencies(config: DrafterConfig, device: torch.device) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2], and the factor of cos and sin that some scalings
    have."""
    if config.rope_scaling is None:
        steps = (
            torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
            / config.head_dim
        )
        return config.rope_theta**-steps, 1.0
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(config.rope_scaling) | {"rope_theta": config.rope_theta}
    layers = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](layers, device)

"""Small random target and drafter pairs for the tests, with every norm weight random: nothing that is wrong cancels out."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_dflash.config import DrafterConfig
from vllm_dflash.weights import expected_tensors

VOCAB, HIDDEN, TARGET_LAYERS = 512, 64, 5


def make_random_target(folder: Path, *, tied: bool = False, seed: int = 0, scale: float = 0.08) -> Path:
    """A Qwen3 target with GQA, an untied lm_head and random norms, in float32; returns its folder."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=TARGET_LAYERS, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, max_position_embeddings=512, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=VOCAB - 1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, scale)
    model.save_pretrained(folder)
    return folder


def random_drafter_config(**changes: object) -> DrafterConfig:
    """A three-layer drafter for ``make_random_target``."""
    fields: dict = dict(
        hidden_size=HIDDEN, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=VOCAB, block_size=8, mask_token_id=1, target_layer_ids=(1, 2, 4),
        num_target_layers=TARGET_LAYERS, max_position_embeddings=512, rope_theta=20000.0, dtype="float32",
    )  # fmt: skip
    return DrafterConfig(**{**fields, **changes})


def make_random_drafter(folder: Path, *, config: DrafterConfig | None = None, seed: int = 1, scale: float = 0.15) -> Path:
    """A random drafter in z-lab's format; returns its folder."""
    import json

    config = config or random_drafter_config()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        noise = torch.empty(shape)
        tensors[name] = noise.uniform_(0.5, 1.5, generator=generator) if "norm" in name else noise.normal_(0, scale, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Small random target and drafter pairs for the tests, with every norm weight random: nothing that
is wrong cancels out."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_dflash.config import DrafterConfig
from vllm_dflash.formats import published_format, write
from vllm_dflash.weights import expected_tensors, optional_tensors

VOCAB, HIDDEN, TARGET_LAYERS = 512, 64, 5


def make_random_target(
    folder: Path, *, tied: bool = False, seed: int = 0, scale: float = 0.08, **changes: object
) -> Path:
    """A Qwen3 target with GQA, an untied lm_head and random norms, in float32; returns its
    folder."""
    torch.manual_seed(seed)
    fields: dict = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=TARGET_LAYERS,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
    )
    model = Qwen3ForCausalLM(Qwen3Config(**fields | changes)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, scale)
    model.save_pretrained(folder)
    return folder


def random_drafter_config(**changes: object) -> DrafterConfig:
    """A three-layer drafter for ``make_random_target``."""
    fields: dict = dict(
        hidden_size=HIDDEN,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        block_size=8,
        mask_token_id=1,
        target_layer_ids=(1, 2, 4),
        num_target_layers=TARGET_LAYERS,
        max_position_embeddings=512,
        rope_theta=20000.0,
        dtype="float32",
        kind="dflash",
    )
    return DrafterConfig(**{**fields, **changes})


def make_random_drafter(
    folder: Path,
    *,
    config: DrafterConfig | None = None,
    seed: int = 1,
    scale: float = 0.15,
    format: str | None = None,
    tables: tuple[str, ...] = (),
    mask_embedding: bool = False,
) -> Path:
    """A random drafter in its kind's published format or another, with optional ``tables`` of its
    own; returns its folder."""
    import json

    config = config or random_drafter_config()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = expected_tensors(config) | {name: optional_tensors(config)[name] for name in tables}
    for name, shape in shapes.items():
        noise = torch.empty(shape)
        tensors[name] = (
            noise.uniform_(0.5, 1.5, generator=generator)
            if "norm" in name
            else noise.normal_(0, scale, generator=generator)
        )
    if "d2t" in tensors:
        ids = (
            torch.randperm(config.vocab_size, generator=generator)[: shapes["d2t"][0]].sort().values
        )
        tensors["d2t"] = ids - torch.arange(len(ids))
    if "layer_fusion_weights" in tensors:
        tensors["layer_fusion_weights"] *= 10
    folder.mkdir(parents=True, exist_ok=True)
    raw = write(config, format or published_format(config), verifier="target")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if mask_embedding:
        embedding = torch.empty(config.hidden_size).normal_(0, 1, generator=generator)
        torch.save(
            {"embedding": embedding, "mask_token_id": config.mask_token_id},
            folder / "mask_embedding.pt",
        )
    return folder


def random_prompts(count: int, vocab: int) -> list[list[int]]:
    """Prompts of 2 to 69 random token ids."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 70, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab - 1, (n,), generator=generator).tolist() for n in lengths]

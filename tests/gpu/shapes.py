"""Pairs that the programs make themselves, with random weights: nothing is fetched.

The large ones have the shapes of published pairs. Weights are made on the GPU where there is one
and written in bfloat16; engines that measure time alone take ``load_format: dummy`` and read none
of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).resolve().parents[2] / "examples" / "embedded_pair"
"""A trained pair of a few million weights: its tau says something."""
POSITIONS = 140_000
"""Of the large shapes: 128k tokens of context and some more."""
_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 1000000.0,
}
TARGETS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    "qwen3-4b": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    # The widths of the 8B target, and little enough of it for plain PyTorch in float32.
    "wide": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
_LARGE_DRAFTER = {
    "num_hidden_layers": 5,
    "target_layer_ids": (1, 9, 17, 25, 33),
    "mask_token_id": 151669,
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _LARGE_DRAFTER,
    "qwen3-4b": _LARGE_DRAFTER,
    "wide": _LARGE_DRAFTER | {"num_hidden_layers": 2, "target_layer_ids": (0, 2, 3)},
    "tiny": {"num_hidden_layers": 3, "target_layer_ids": (0, 2, 3), "mask_token_id": 1},
}
_BYTES = 2
"""Of a bfloat16."""


@dataclass(frozen=True)
class Pair:
    """A target's and a drafter's folder, and the drafter's block."""

    target: Path
    drafter: Path
    block_size: int


def embedded(kind: str = "dflash") -> Pair:
    """The trained pair of the repository; ``kind``: dflash or dflare."""
    return Pair(EMBEDDED / "target", EMBEDDED / kind, 8)


def make_pair(
    shape: str,
    folder: Path,
    *,
    block_size: int = 16,
    dtype: str = "bfloat16",
    weights: bool = False,
    own_tables: bool = False,
) -> Pair:
    """A random pair in ``folder``; one that is there is taken as it is.

    Args:
        shape: one of ``TARGETS``.
        dtype: of the weights.
        weights: write the target's too, for plain PyTorch and for engines that read them.
        own_tables: the drafter has an lm_head over a part of the vocabulary and a mask embedding.
    """
    pair = Pair(folder / "target", folder / "drafter", block_size)
    if (folder / "made").is_file():
        return pair
    from pairs import make_random_drafter  # tests/pairs.py
    from vllm_dflash.config import DrafterConfig

    sizes = TARGETS[shape]
    shared = {
        n: v for n, v in sizes.items() if n not in ("num_hidden_layers", "tie_word_embeddings")
    }
    config = DrafterConfig(
        **shared,
        **DRAFTERS[shape],
        num_target_layers=sizes["num_hidden_layers"],
        block_size=block_size,
        dtype=dtype,
        kind="dflash",
        **({"draft_vocab_size": sizes["vocab_size"] // 2} if own_tables else {}),
    )
    pair.target.mkdir(parents=True, exist_ok=True)
    _write_target(pair.target, sizes, dtype, weights)
    if own_tables or shape == "tiny":
        make_random_drafter(
            pair.drafter,
            config=config,
            scale=0.15 if shape == "tiny" else 0.02,
            format="speculators" if own_tables else None,
            mask_embedding=own_tables,
        )
    else:
        _write_drafter(pair.drafter, config)
    (folder / "made").touch()
    return pair


def bytes_of(shape: str, method_has_drafter: bool) -> int:
    """Of an engine's weights, in bfloat16; an estimate."""
    s = TARGETS[shape]
    layer = (
        s["hidden_size"] * s["head_dim"] * 2 * (s["num_attention_heads"] + s["num_key_value_heads"])
        + 3 * s["hidden_size"] * s["intermediate_size"]
    )
    tables = s["vocab_size"] * s["hidden_size"] * (1 if s["tie_word_embeddings"] else 2)
    d = DRAFTERS[shape]
    drafter = d["num_hidden_layers"] * layer + len(d["target_layer_ids"]) * s["hidden_size"] ** 2
    return _BYTES * (s["num_hidden_layers"] * layer + tables + method_has_drafter * drafter)


def cache_bytes_a_token(shape: str) -> int:
    """Of the target's and the drafter's KV cache, in bfloat16."""
    s = TARGETS[shape]
    layers = s["num_hidden_layers"] + DRAFTERS[shape]["num_hidden_layers"]
    return int(_BYTES * 2 * layers * s["num_key_value_heads"] * s["head_dim"])


def _write_target(folder: Path, sizes: Mapping[str, Any], dtype: str, weights: bool) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": dtype,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(dict(sizes) | config, indent=2))
    if not weights:
        return
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = (
        sizes["head_dim"] * sizes[f"num_{n}_heads"] for n in ("attention", "key_value")
    )  # fmt: skip
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (sizes["head_dim"],),
        "self_attn.k_norm": (sizes["head_dim"],),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(sizes["num_hidden_layers"])
        for name, shape in layer.items()
    }
    table = (sizes["vocab_size"], hidden)
    shapes |= {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not sizes["tie_word_embeddings"]:
        shapes["lm_head.weight"] = table
    _save(folder, shapes, dtype, seed=0, scale=0.08 if hidden < 256 else 0.02)


def _write_drafter(folder: Path, config: Any) -> None:
    from vllm_dflash.formats import published_format, write
    from vllm_dflash.weights import expected_tensors

    folder.mkdir(parents=True, exist_ok=True)
    raw = write(config, published_format(config), verifier="target")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    _save(folder, expected_tensors(config), config.dtype, seed=1, scale=0.02)


def _save(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, *, seed: int, scale: float
) -> None:
    """Norms between a half and one and a half, so that nothing wrong cancels out; all else
    normal."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        made = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if "norm" in name:
            made.uniform_(0.5, 1.5, generator=generator)
        else:
            made.normal_(0, scale, generator=generator)
        tensors[name] = made.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if device == "cuda":
        torch.cuda.empty_cache()  # the engines' now

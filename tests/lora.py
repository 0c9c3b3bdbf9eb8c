"""A small random LoRA adapter in peft's file format, and the same merged into its target's weights:
what an adapter's output must equal."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_adapter(folder: Path, target: Path, *, scale: float = 0.05, seed: int = 3) -> Path:
    """A random adapter of all projections of the ``target`` folder, float32; returns its folder."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in load_file(target / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(PROJECTIONS):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.empty(RANK, weight.shape[1]).normal_(
                0, scale, generator=generator
            )
            tensors[f"{stem}.lora_B.weight"] = torch.empty(weight.shape[0], RANK).normal_(
                0, scale, generator=generator
            )
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted(p.rpartition(".")[2] for p in PROJECTIONS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": modules,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(folder: Path, target: Path, adapter: Path) -> Path:
    """The target with the adapter added to its weights; returns its folder."""
    shutil.copytree(target, folder)
    weights, parts = (
        load_file(target / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name, a in parts.items():
        if name.endswith("lora_A.weight"):
            own = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            change = parts[name.replace("lora_A", "lora_B")] @ a * (ALPHA / RANK)
            weights[own] = (weights[own].float() + change).contiguous()
    save_file(
        {name: t.float() for name, t in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder

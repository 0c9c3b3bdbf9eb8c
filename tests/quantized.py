"""A drafter with 4-bit weights in compressed-tensors' packed format, and the same drafter with
those weights written out; and a target with 8-bit weights and activations."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP, BITS = 32, 4
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": BITS,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
        }
    },
    "ignore": ["lm_head"],
}


def quantize(drafter: Path, packed: Path, written_out: Path) -> None:
    """Writes ``drafter`` with its layers' projections in 4 bits to ``packed``, and what they stand
    for to ``written_out``."""
    tensors = load_file(drafter / "model.safetensors")
    small, plain = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            small[name] = plain[name] = tensor
            continue
        groups = tensor.float().unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True) / (2 ** (BITS - 1) - 1)
        levels = (groups / scale).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        plain[name] = (levels * scale).flatten(1)
        shifted = (
            (levels + 2 ** (BITS - 1)).flatten(1).to(torch.int64).unflatten(1, (-1, 32 // BITS))
        )
        word = (shifted << (torch.arange(32 // BITS) * BITS)).sum(-1)
        stem = name.removesuffix("weight")
        small[f"{stem}weight_packed"] = (word - (word >= 2**31) * 2**32).to(torch.int32)
        small[f"{stem}weight_scale"] = scale.squeeze(-1)
        small[f"{stem}weight_shape"] = torch.tensor(tensor.shape)
    for folder, content in ((packed, small), (written_out, plain)):
        shutil.copytree(drafter, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": False,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}


def quantize_target(target: Path, folder: Path) -> None:
    """Writes ``target`` with its layers' projections in 8 bits, a scale for each row, to
    ``folder``; activations are rounded to 8 bits as they come, a scale and a zero for each token
    (without a zero, vLLM's kernel for CPUs with AMX takes no float32)."""
    small = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            small[name] = tensor
            continue
        scale = tensor.float().abs().amax(-1, keepdim=True) / 127
        small[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
        small[f"{name}_scale"] = scale
    shutil.copytree(target, folder)
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": INT8}))

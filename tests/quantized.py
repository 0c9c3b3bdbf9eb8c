"""A drafter with 4-bit weights in compressed-tensors' packed format, and the same drafter with
those weights written out."""

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

"""Saves and loads a reference drafter in z-lab's format: ``config.json`` and ``model.safetensors``.

Tests: ``pytest tests/unit/test_weights.py``.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.drafter import DFlashDrafter
from vllm_dflash.weights import SINGLE_FILE, check_tensors, expected_tensors, weight_files


def save_drafter(folder: str | Path, model: DFlashDrafter) -> None:
    """Writes ``model`` to ``folder`` (made if absent), in the dtype that the model is held in."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == expected_tensors(model.config)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = model.config.with_(dtype=dtype)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_drafter(folder: str | Path, dtype: torch.dtype) -> DFlashDrafter:
    """The drafter in ``folder``, its parameters cast to ``dtype``, in eval mode.

    Raises:
        DrafterConfigError: the configuration or the weights are unusable.
    """
    config = DrafterConfig.from_pretrained(folder)
    check_tensors(config, folder)
    tensors = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
    model = DFlashDrafter(config)
    model.load_state_dict(tensors)
    return model.to(dtype).eval()

"""How tests break a checkpoint, and what they ask of its refusal: the name of what is wrong, and a
remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.tools.inspect import inspect_checkpoint

REMEDY = re.compile(
    r"fetch the checkpoint again|came with|came along|use files of one|use another|use config|use"
    r" the|point (at|'model')|give (a|an|the|its|\d+)|"
    r"one of |at least 2|true or false|or null|fix config|trained with|one a layer|each layer"
    r" once|one-based|remove|serve it with|or an? object",
    re.IGNORECASE,
)


def refused(folder: Path, *words: str) -> str:
    """The message of what refuses the folder; the tool for it finds the same."""
    with pytest.raises(DrafterConfigError) as error:
        load_drafter(folder, torch.float32)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert REMEDY.search(message), message
    found = inspect_checkpoint(folder)
    assert not found.sound
    assert any(all(word in problem for word in words) for problem in found.problems), found.problems
    return message


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Splits the weights in two; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in sorted(set(places.values())):
        save_file(
            {name: tensor for name, tensor in tensors.items() if places[name] == file},
            folder / file,
        )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def refused_or_read(raw: Any) -> DrafterConfigError | None:
    """Why a config is refused, if it is."""
    try:
        DrafterConfig.from_dict(raw)
    except DrafterConfigError as error:
        return error
    return None


def refusal(raw: Any) -> DrafterConfigError:
    """Why a config is refused, with a remedy."""
    with pytest.raises(DrafterConfigError) as error:
        DrafterConfig.from_dict(raw)
    assert REMEDY.search(str(error.value)), error.value
    return error.value

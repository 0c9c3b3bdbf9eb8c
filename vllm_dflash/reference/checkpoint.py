"""Saves and loads a reference drafter: ``config.json`` and ``model.safetensors`` in any of the
known formats.

Tests: ``pytest tests/unit/test_weights.py tests/unit/test_formats.py``.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import CONFIG_FILE, published_format, write
from vllm_dflash.kinds import kind_of
from vllm_dflash.reference.drafter import Drafter, OwnTables
from vllm_dflash.weights import check_tensors, expected_tensors, optional_tensors
from vllm_dflash.weights.headers import SINGLE_FILE
from vllm_dflash.weights.identity import read_tensors
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING_FILE, read_mask_embedding
from vllm_dflash.weights.values import check_finite

_OWN = {"embed_tokens.weight": "embed_tokens", "lm_head.weight": "lm_head", "d2t": "d2t"}


def new_drafter(config: DrafterConfig) -> Drafter:
    """A drafter of the configuration's kind with fresh weights."""
    drafter = kind_of(config).context_part("Reference")(config)
    assert isinstance(drafter, Drafter)
    return drafter


def save_drafter(folder: str | Path, model: Drafter) -> None:
    """Writes ``model``, tables of its own too, to ``folder`` (made if absent) in its kind's
    published format and in the dtype that it is held in."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = next(model.parameters()).dtype
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    mask = tensors.pop("mask_embedding", None)
    for name, own in _OWN.items():
        table = getattr(model.own, own)
        if table is not None:
            tensors[name] = table.detach().contiguous().to(held if own != "d2t" else table.dtype)
    shapes, expected = (
        {n: tuple(t.shape) for n, t in tensors.items()},
        expected_tensors(model.config),
    )
    assert expected.items() <= shapes.items() <= (optional_tensors(model.config) | expected).items()
    config = model.config.with_(dtype=str(held).removeprefix("torch."))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    if mask is not None:
        # A copy: torch writes all of what a tensor is a view of.
        state = {"embedding": mask.cpu().clone(), "mask_token_id": config.mask_token_id}
        torch.save(state, folder / MASK_EMBEDDING_FILE)
    (folder / CONFIG_FILE).write_text(
        json.dumps(write(config, published_format(config)), indent=2) + "\n"
    )


def load_drafter(
    folder: str | Path, dtype: torch.dtype, config: DrafterConfig | None = None
) -> Drafter:
    """The drafter in ``folder``, its parameters cast to ``dtype``, in eval mode; ``config`` in
    place of what its config.json says.

    Raises:
        DrafterConfigError: the configuration or the weights are unusable.
    """
    config = config or DrafterConfig.from_pretrained(folder)
    if config.quantization_config is not None:
        raise DrafterConfigError(
            "the weights are quantized, which plain PyTorch does not run",
            "serve it with vLLM",
            where=str(folder),
        )
    check_tensors(config, folder, dtype)
    tensors = read_tensors(folder)
    check_finite(tensors, dtype)
    tables = {own: tensors.pop(name) for name, own in _OWN.items() if name in tensors}
    model = new_drafter(config)
    model.load_state_dict(tensors)
    model.own = OwnTables(
        **{name: table if name == "d2t" else table.to(dtype) for name, table in tables.items()}
    )
    embedding = read_mask_embedding(folder, config, dtype)
    if embedding is not None:
        model.mask_embedding = nn.Parameter(embedding)
    return model.to(dtype).eval()

"""A checkpoint's trained mask embedding, which is in a file of its own.

pytest tests/unit/test_broken_weights.py
"""

import io
from pathlib import Path
from typing import TypeGuard

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.regular import read_regular
from vllm_dflash.weights.messages import FETCH_AGAIN
from vllm_dflash.weights.values import is_finite, overflow

MASK_EMBEDDING_FILE = "mask_embedding.pt"
MASK_EMBEDDING = "mask_embedding"
"""The name of that file's tensor, [H], where new weights are pushed into a running engine."""
_LARGEST_EMBEDDING = 1 << 26
_BEGINNINGS = (b"PK", b"\x80")
"""Of what torch.save writes: an archive, or a pickle. Of other bytes the unpickler says nothing of
use."""


def read_mask_embedding(
    folder: str | Path, config: DrafterConfig, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """The trained mask embedding [H] of ``mask_embedding.pt``, where the folder has that file;
    ``dtype``: that in which it serves.

    Raises:
        DrafterConfigError: the file is unusable, or for another mask token or size.
    """
    path = Path(folder) / MASK_EMBEDDING_FILE
    data = read_regular(path, _LARGEST_EMBEDDING)
    return None if data is None else load_mask_embedding(data, config, str(path), dtype)


def load_mask_embedding(
    data: bytes, config: DrafterConfig, path: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The mask embedding [H] in the bytes of a ``mask_embedding.pt``; ``path`` is for messages,
    ``dtype`` that in which it serves.

    Raises:
        DrafterConfigError: they are not tensors saved by torch, or as ``mask_embedding``.
    """
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (
        Exception
    ) as error:  # whatever the unpickler and torch's tensors end in: the file is not ours
        first = (
            (str(error).strip().splitlines() or [repr(error)])[0]
            if data.startswith(_BEGINNINGS)
            else "torch.save writes no such file"
        )
        raise DrafterConfigError(
            f"{path} cannot be read as tensors ({first})", FETCH_AGAIN
        ) from None
    return mask_embedding(state, config, path, dtype or getattr(torch, config.dtype))


def mask_embedding(
    state: object, config: DrafterConfig, path: str, dtype: torch.dtype
) -> torch.Tensor:
    """The embedding [H] in the contents of ``mask_embedding.pt``: a tensor, or a mapping with
    ``embedding``.

    Raises:
        DrafterConfigError: it is neither, for another mask token or size, or not finite in
            ``dtype``.
    """
    if isinstance(state, dict):
        token = state.get("mask_token_id", config.mask_token_id)
        whole = _is_plain(token) and token.numel() == 1 and not token.is_floating_point()
        token = token.item() if whole and isinstance(token, torch.Tensor) else token
        if not isinstance(token, int) or token != config.mask_token_id:
            shown = "a tensor" if isinstance(token, torch.Tensor) else f"{token}"
            raise DrafterConfigError(
                f"{path} is for mask_token_id {shown}, config.json says {config.mask_token_id}",
                "use files of one checkpoint",
            )
        state = state.get("embedding")
    if not isinstance(state, torch.Tensor) or not _is_plain(state) or not state.is_floating_point():
        what = (
            "no finite embedding"
            if not isinstance(state, torch.Tensor)
            else f"{_kind(state)}, no finite embedding"
        )
    elif state.numel() != config.hidden_size or not is_finite(state):
        what = "no finite embedding"
    elif not is_finite(state, dtype):
        raise overflow(path, dtype)
    else:
        return state.detach().reshape(-1)
    raise DrafterConfigError(
        f"{path} holds {what} of {config.hidden_size} elements", "fetch the checkpoint again"
    )


def _is_plain(tensor: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor whose elements are in memory one by one, none of torch's other
    kinds."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return "a nested tensor"
    if tensor.device.type != "cpu":
        return f"a {tensor.device.type} tensor without elements"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    return (
        "a quantized tensor"
        if tensor.is_quantized
        else f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    )

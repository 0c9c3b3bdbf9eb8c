"""A checkpoint's tensors, as an engine reads them, and the id that is made of them
(``serving_drafter.id_of``).

pytest tests/unit/test_follow_identity.py
"""

from hashlib import sha256
from pathlib import Path

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.formats import IGNORED_TENSORS, tensor_name
from vllm_dflash.serving_drafter import id_of
from vllm_dflash.weights.headers import weight_files
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING, read_mask_embedding
from vllm_dflash.weights.reading import open_weights


def digest_of(tensor: torch.Tensor) -> bytes:
    """32 bytes that stand for the dtype, the shape and every byte of a tensor of any shape."""
    whole = tensor.detach().cpu().contiguous()
    digest = sha256(f"{whole.dtype} {list(whole.shape)}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's weight files by our names, without those that only
    training needs."""
    named = {
        tensor_name(name): tensor
        for path in weight_files(folder)
        for name, tensor in _tensors(path).items()
    }
    return {name: tensor for name, tensor in named.items() if name not in IGNORED_TENSORS}


def id_of_folder(folder: Path) -> str:
    """The id that an engine gives to this checkpoint's weights.

    Raises:
        DrafterConfigError: the folder's configuration, or a file of it, is unusable.
    """
    mask = read_mask_embedding(folder, DrafterConfig.from_pretrained(folder))
    tensors = read_tensors(folder) | ({} if mask is None else {MASK_EMBEDDING: mask})
    return id_of({name: digest_of(tensor) for name, tensor in tensors.items()})

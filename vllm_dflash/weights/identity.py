"""What a drafter's id is made of (``serving_drafter.id_of``): its tensors, as an engine reads them.

pytest tests/unit/test_follow_identity.py
"""

from hashlib import sha256
from pathlib import Path

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.checkpoint import read_tensors
from vllm_dflash.serving_drafter import id_of
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING, read_mask_embedding


def digest_of(tensor: torch.Tensor) -> bytes:
    """32 bytes that stand for the dtype, the shape and every byte of a tensor of any shape."""
    whole = tensor.detach().cpu().contiguous()
    digest = sha256(f"{whole.dtype} {list(whole.shape)}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def id_of_folder(folder: Path) -> str:
    """The id that an engine gives to this checkpoint's weights.

    Raises:
        DrafterConfigError: the folder's configuration, or a file of it, is unusable.
    """
    mask = read_mask_embedding(folder, DrafterConfig.from_pretrained(folder))
    tensors = read_tensors(folder) | ({} if mask is None else {MASK_EMBEDDING: mask})
    return id_of({name: digest_of(tensor) for name, tensor in tensors.items()})

"""The id that an engine gives to a checkpoint's weights, from its folder.

pytest tests/unit/test_follow_identity.py
"""

from pathlib import Path

from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.checkpoint import read_tensors
from vllm_dflash.serving_drafter import id_of
from vllm_dflash.weights.identity import digest_of
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING, read_mask_embedding


def id_of_folder(folder: Path) -> str:
    """Twelve hexadecimal digits.

    Raises:
        DrafterConfigError: the folder's configuration, or a file of it, is unusable.
    """
    mask = read_mask_embedding(folder, DrafterConfig.from_pretrained(folder))
    tensors = read_tensors(folder) | ({} if mask is None else {MASK_EMBEDDING: mask})
    return id_of({name: digest_of(tensor) for name, tensor in tensors.items()})

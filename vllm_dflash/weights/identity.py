"""What a drafter's id is made of (``serving_drafter.id_of``): its tensors, as an engine reads them.

pytest tests/unit/test_follow_identity.py
"""

from hashlib import sha256

import torch


def digest_of(tensor: torch.Tensor) -> bytes:
    """32 bytes that stand for the dtype, the shape and every byte of a tensor of any shape."""
    whole = tensor.detach().cpu().contiguous()
    digest = sha256(f"{whole.dtype} {list(whole.shape)}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()

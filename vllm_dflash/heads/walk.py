"""A walk through candidates by edges that are all scored before it, as heads are served.

pytest tests/unit/test_heads.py
"""

import torch
from torch import Tensor

from vllm_dflash.heads import Ranked


def walk(edges: Tensor, candidates: Tensor, confident: bool) -> Ranked:
    """The best edge from row to row, looked up without a question to the device.

    Args:
        edges: [B, K, k, k] float32, from the row before's candidates to the row's; of the first row
            from the anchor, k times the same.
        candidates: [B, K, k] int64, of each row.
        confident: whether the probability of each token among its row's candidates is wanted.
    """
    best, at, walked = edges.argmax(-1), torch.zeros_like(candidates[:, 0, 0]), []
    for row in range(edges.shape[1]):
        at = best[:, row].gather(1, at[:, None])[:, 0]
        walked.append(at)
    path = torch.stack(walked, dim=1)
    tokens = candidates.gather(2, path[..., None])[..., 0]
    if not confident:
        return tokens, None
    came_from = torch.cat([torch.zeros_like(path[:, :1]), path[:, :-1]], dim=1)
    came_from = came_from[..., None, None].expand(-1, -1, 1, edges.shape[-1])
    taken = edges.gather(2, came_from)[:, :, 0]
    return tokens, taken.softmax(-1).gather(2, path[..., None])[..., 0]

"""The walk through candidates in plain PyTorch, and served.

pytest tests/unit/test_heads.py tests/engine/test_formats.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads import Ranked, Ranking
from vllm_dflash.heads.candidates import PART, own_tensors
from vllm_dflash.heads.reference import Block, Lesson, ReferenceHead, cross_entropy
from vllm_dflash.heads.walk import walk
from vllm_dflash.models.parameters import ServedTensors

_FIRST_SCALE = 0.02
"""Standard deviation of the codebooks at first: the walk begins nearly as argmax."""


class Selector(nn.Module):
    """The low-rank part of an edge's score."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank = config.head["selector_rank"]
        self.predecessor_codebook, self.successor_codebook = (
            nn.Parameter(torch.randn(config.vocab_size, rank) * _FIRST_SCALE) for _ in range(2)
        )
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)

    def forward(self, hidden: Tensor, before: Tensor, candidates: Tensor) -> Tensor:
        """``hidden`` [..., H], ``before`` [...], ``candidates`` [..., k] -> [..., k] float32."""
        gate = self.predecessor_codebook[before].float() * self.hidden_projection(hidden).float()
        return (self.successor_codebook[candidates].float() * gate[..., None, :]).sum(-1)


class Reference(ReferenceHead):
    """In plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.top_k = config.head["selector_top_k"]
        self.candidate_selector = Selector(config)

    def scores(self, block: Block, before: Tensor) -> Tensor:
        own, candidates = block.logits.topk(self.top_k)
        edges = own + self.candidate_selector(block.hidden, before, candidates)
        return torch.full_like(block.logits, float("-inf")).scatter(-1, candidates, edges)

    def lesson(self, block: Block, before: Tensor, labels: Tensor) -> Lesson:
        """The logits' cross-entropy, and beside it that of the edges among candidates.

        A label that is no candidate takes the last one's place there, for nothing would be learned
        of it otherwise.
        """
        candidates = block.logits.detach().topk(self.top_k).indices
        is_label = candidates == labels[..., None]
        learned = candidates.clone()
        learned[..., -1] = torch.where(is_label.any(-1), candidates[..., -1], labels)
        edges = block.logits.gather(-1, learned)
        edges = edges + self.candidate_selector(block.hidden, before, learned)
        place = (learned == labels[..., None]).long().argmax(-1)
        best = edges.detach()
        # What drafting ranks: not the label where it is no candidate.
        best = best.masked_fill(learned != candidates, float("-inf")).argmax(-1)
        return Lesson(
            cross_entropy(block.logits, labels),
            cross_entropy(edges, place),
            learned.gather(-1, best[..., None])[..., 0],
        )


class Served(ServedTensors):
    """The same for vLLM."""

    def __init__(self, config: DrafterConfig, dtype: torch.dtype) -> None:
        super().__init__(own_tensors(config), dtype)
        self.top_k = config.head["selector_top_k"]

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: Ranking) -> Ranked:
        """All edges are scored at once; the walk only looks them up."""
        own, candidates = ranking.logits(hidden).float().topk(self.top_k)
        own, candidates = (x.view(-1, k, self.top_k) for x in (own, candidates))
        first = anchors.long()[:, None, None].expand(-1, 1, self.top_k)
        before = torch.cat([first, candidates[:, :-1]], dim=1)
        gate = F.linear(hidden, self.own(f"{PART}.hidden_projection.weight")).float()
        gate = gate.view(len(own), k, 1, -1)
        predecessors, successors = (
            self.own(f"{PART}.{name}_codebook") for name in ("predecessor", "successor")
        )
        # [B, K, candidates of the row before, candidates of the row]
        edges = own[:, :, None] + (predecessors[before].float() * gate) @ (
            successors[candidates].float().transpose(-1, -2)
        )
        return walk(edges, candidates, ranking.confident)

"""LiLiCorr in plain PyTorch, around ``network.py``, and served.

pytest tests/unit/test_heads.py tests/unit/test_lattice.py tests/engine/test_formats.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads import Ranked, Ranking
from vllm_dflash.heads.lattice import FEATURES, PART, own_tensors, width
from vllm_dflash.heads.lattice.network import Lattice
from vllm_dflash.heads.reference import Block, Lesson, ReferenceHead, cross_entropy
from vllm_dflash.heads.walk import walk
from vllm_dflash.models.parameters import ServedTensors

_EDGES_SHARE = 0.25
"""Of the edges' cross-entropy in the loss, as published."""


class Reference(ReferenceHead):
    """In plain PyTorch; its blocks [..., K] are whole."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.lilicorr = Lattice(config)

    def edges(self, block: Block) -> tuple[Tensor, Tensor]:
        """Candidates [..., K, k] int64 of each row, and the edges [..., K, k, k] to them."""
        candidates = block.logits.detach().topk(self.lilicorr.top_k).indices
        probable = block.logits.gather(-1, candidates) - block.logits.logsumexp(-1, keepdim=True)
        return candidates, self.lilicorr(block, candidates, probable)

    def after(self, candidates: Tensor, edges: Tensor, before: Tensor) -> Tensor:
        """Of the ``edges`` those [..., K, k] from the tokens ``before`` [..., K]; from the first
        candidate where such a token is none."""
        came_from = (candidates[..., :-1, :] == before[..., 1:, None]).long().argmax(-1)
        came_from = torch.cat([torch.zeros_like(before[..., :1]), came_from], dim=-1)
        at = came_from[..., None, None].expand(*came_from.shape, 1, edges.shape[-1])
        return edges.gather(-2, at)[..., 0, :]

    def scores(self, block: Block, before: Tensor) -> Tensor:
        candidates, edges = self.edges(block)
        ranked = self.after(candidates, edges, before)
        return torch.full_like(block.logits, float("-inf")).scatter(-1, candidates, ranked)

    def draft(self, block: Block, anchors: Tensor) -> tuple[Tensor, Tensor]:
        candidates, edges = self.edges(block)
        at, scores, tokens = torch.zeros_like(anchors)[..., None], [], []
        for row in range(candidates.shape[-2]):
            line = at[..., None].expand(*at.shape, edges.shape[-1])
            ranked = edges[..., row, :, :].gather(-2, line)[..., 0, :]
            at = ranked.argmax(-1, keepdim=True)
            tokens.append(candidates[..., row, :].gather(-1, at)[..., 0])
            scores.append(ranked)
        whole = torch.full_like(block.logits, float("-inf"))
        return torch.stack(tokens, -1), whole.scatter(-1, candidates, torch.stack(scores, -2))

    def lesson(self, block: Block, before: Tensor, labels: Tensor) -> Lesson:
        """The logits' cross-entropy, and beside it that of the edges among candidates, as far as
        all labels of a block are candidates; the published penalty by the target's own logits is
        left out."""
        candidates, edges = self.edges(block)
        ranked = self.after(candidates, edges, before)
        is_label = candidates == labels[..., None]
        reached = is_label.any(-1).long().cumprod(-1)
        return Lesson(
            cross_entropy(block.logits, labels),
            _EDGES_SHARE * reached * cross_entropy(ranked, is_label.long().argmax(-1)),
            candidates.gather(-1, ranked.detach().argmax(-1, keepdim=True))[..., 0],
        )


class Served(ServedTensors):
    """The same for vLLM."""

    def __init__(self, config: DrafterConfig, dtype: torch.dtype) -> None:
        super().__init__(own_tensors(config), dtype)
        head = config.head
        self.top_k, self.block_size = head["lilicorr_candidate_topk"], config.block_size
        self.vector_eps, self.scale = head["lilicorr_vector_eps"], head["lilicorr_logit_scale"]
        self.num_heads, self.depth = head["lilicorr_num_heads"], head["lilicorr_num_layers"]
        self.eps, self.projects = config.rms_norm_eps, width(config) != config.hidden_size

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: Ranking) -> Ranked:
        """All edges are scored at once; the walk only looks them up."""
        assert ranking.embed is not None
        logits = ranking.logits(hidden).float()
        own, candidates = logits.topk(self.top_k)
        probable = own - logits.logsumexp(-1, keepdim=True)
        x = self._states(hidden, ranking.embed(candidates), probable, k)
        return walk(self._edges(x, ranking), candidates.view(-1, k, self.top_k), ranking.confident)

    def _states(self, hidden: Tensor, embedded: Tensor, probable: Tensor, k: int) -> Tensor:
        """Of the rows' ``hidden`` [B * k, H] and candidates: what the lattice makes of each [B, k *
        candidates, h]."""
        rank = torch.arange(self.top_k, device=hidden.device, dtype=torch.float32)
        features = torch.stack(
            [
                probable,
                probable.exp(),
                probable - probable[:, :1],
                (rank / (self.top_k - 1)).expand_as(probable),
                (rank == 0).float().expand_as(probable),
            ],
            dim=-1,
        ).to(hidden.dtype)
        features = F.layer_norm(
            features, (FEATURES,), self._of("feature_norm.weight"), self._of("feature_norm.bias")
        )
        tokens = embedded.to(hidden.dtype)
        x = (
            (self._linear("token_proj", tokens) if self.projects else tokens)
            + self._linear("pass_hidden_proj", hidden)[:, None]
            + self._mlp("feature_mlp", features)
        ).view(-1, k, self.top_k, self._of("output_norm.weight").shape[0])
        x = x + self._of("slot_embedding")[0, :, :k] + self._of("rank_embedding")[0]
        x = x.flatten(1, 2)
        row = torch.arange(k, device=x.device).repeat_interleave(self.top_k)
        apart = row[:, None] - row
        bias = self._of("relative_slot_bias")[:, apart + self.block_size - 1]
        bias = bias + (apart == 0).to(bias.dtype) * self._of("same_slot_bias")[:, None, None]
        for i in range(self.depth):
            x = x + self._attention(f"layers.{i}", x, bias)
            x = x + self._mlp(f"layers.{i}.mlp", self._norm(f"layers.{i}.mlp_norm", x))
        return self._norm("output_norm", x).view(len(x), k, self.top_k, -1)

    def _attention(self, layer: str, x: Tensor, bias: Tensor) -> Tensor:
        qkv = F.linear(
            self._norm(f"{layer}.attn_norm", x),
            self._of(f"{layer}.attn.in_proj_weight"),
            self._of(f"{layer}.attn.in_proj_bias"),
        )
        query, key, value = (
            qkv.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self._linear(f"{layer}.attn.out_proj", out.transpose(1, 2).flatten(2))

    def _edges(self, x: Tensor, ranking: Ranking) -> Tensor:
        """Of the candidates' states [B, K, k, h], and the anchors': edges [B, K, k, k] float32."""
        assert ranking.before is not None
        anchor = self._norm("anchor_norm", self._linear("context_proj", ranking.before))
        beside, size = anchor[:, None, None], x.shape[-1]
        # The input of the matrix is [state, anchor, their product]: each part by itself, so that
        # the anchor's is computed once.
        matrix = self._of("factor_input_proj.weight")
        factors = F.silu(
            F.linear(x, matrix[:, :size], self._of("factor_input_proj.bias"))
            + F.linear(beside, matrix[:, size : 2 * size])
            + F.linear(x * beside, matrix[:, 2 * size :])
        )
        out, into, start = (
            F.normalize(self._linear(name, y), dim=-1, eps=self.vector_eps)
            for name, y in (
                ("out_head", factors),
                ("in_head", factors),
                ("anchor_out_head", anchor),
            )
        )
        first = start[:, None, None].expand(-1, 1, self.top_k, -1)
        edges = torch.cat([first, out[:, :-1]], dim=1) @ into.transpose(-1, -2)
        return self.scale * edges.float()

    def _of(self, name: str) -> Any:
        return self.own(f"{PART}.{name}")

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._of(f"{name}.weight"), self._of(f"{name}.bias"))

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.down_proj", F.silu(self._linear(f"{name}.up_proj", x)))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self._of(f"{name}.weight")
        return F.rms_norm(x, weight.shape, weight, self.eps)

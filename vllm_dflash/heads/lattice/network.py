"""LiLiCorr's lattice in plain PyTorch: what scores the edges.

pytest tests/unit/test_lattice.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads.lattice import FEATURES, width
from vllm_dflash.heads.reference import Block
from vllm_dflash.kinds import kind_of
from vllm_dflash.reference.drafter import RMSNorm

_FIRST_SCALE = 0.02
"""Standard deviation of the matrices at first: of both sides of an edge above 0, or neither would
learn."""


class MLP(nn.Module):
    """Two matrices with biases, and SiLU between them."""

    def __init__(self, size: int, inner: int, out: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(size, inner), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


class LatticeAttention(nn.Module):
    """Every candidate sees every other one of its block."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` [..., L, h], ``bias`` [heads, L, L] added to the scores."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for t in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        )
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + bias
        out = scores.float().softmax(-1).to(value.dtype) @ value
        return self.out_proj(out.transpose(-2, -3).flatten(-2))


class LatticeLayer(nn.Module):
    """Pre-norm attention and MLP over a lattice."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        size = width(config)
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.attn = LatticeAttention(size, config.head["lilicorr_num_heads"])
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.mlp = MLP(size, int(size * config.head["lilicorr_mlp_ratio"]), size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class Lattice(nn.Module):
    """Scores all edges of a block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        head, size, hidden = config.head, width(config), config.hidden_size
        heads, factor = head["lilicorr_num_heads"], head["lilicorr_factor_dim"]
        self.top_k, self.block_size = head["lilicorr_candidate_topk"], config.block_size
        self.eps, self.scale = head["lilicorr_vector_eps"], head["lilicorr_logit_scale"]
        self.token_proj = nn.Identity() if size == hidden else nn.Linear(hidden, size)
        self.pass_hidden_proj = nn.Linear(hidden, size)
        self.feature_norm = nn.LayerNorm(FEATURES)
        self.feature_mlp = MLP(FEATURES, size, size)
        self.slot_embedding = nn.Parameter(
            torch.zeros(1, 1, config.max_speculative_tokens, 1, size)
        )
        self.rank_embedding = nn.Parameter(torch.zeros(1, 1, 1, self.top_k, size))
        self.relative_slot_bias = nn.Parameter(torch.zeros(heads, 2 * config.block_size - 1))
        self.same_slot_bias = nn.Parameter(torch.zeros(heads))
        self.context_proj = nn.Linear(kind_of(config).context.width(config), size)
        self.layers = nn.ModuleList(
            LatticeLayer(config) for _ in range(head["lilicorr_num_layers"])
        )
        self.output_norm = RMSNorm(size, config.rms_norm_eps)
        self.anchor_norm = RMSNorm(size, config.rms_norm_eps)
        self.factor_input_proj = nn.Linear(3 * size, size)
        self.out_head, self.in_head, self.anchor_out_head = (
            nn.Linear(size, factor) for _ in range(3)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, _FIRST_SCALE)
                nn.init.zeros_(module.bias)

    def bias(self, rows: int) -> Tensor:
        """[heads, rows * k, rows * k]: by how many rows candidates are apart, and for the same
        row."""
        row = torch.arange(rows, device=self.same_slot_bias.device).repeat_interleave(self.top_k)
        apart = row[:, None] - row
        same = (apart == 0) * self.same_slot_bias[:, None, None]
        return self.relative_slot_bias[:, apart + self.block_size - 1] + same

    def features(self, probable: Tensor) -> Tensor:
        """Log-probabilities [..., k], the best first, as numbers [..., k, 5]."""
        rank = torch.arange(self.top_k, device=probable.device)
        return torch.stack(
            [
                probable,
                probable.exp(),
                probable - probable.amax(-1, keepdim=True),
                (rank / (self.top_k - 1)).expand_as(probable),
                (rank == 0).to(probable).expand_as(probable),
            ],
            dim=-1,
        )

    def forward(self, block: Block, candidates: Tensor, probable: Tensor) -> Tensor:
        """``candidates`` [..., K, k] and their log-probabilities -> edges [..., K, k, k] float32.

        Of the first row all k lines are the anchor's.
        """
        assert block.embed is not None
        assert block.before is not None
        rows = candidates.shape[-2]
        x = self.token_proj(block.embed(candidates).to(block.hidden.dtype))
        x = x + self.pass_hidden_proj(block.hidden)[..., None, :]
        x = x + self.feature_mlp(self.feature_norm(self.features(probable).to(x.dtype)))
        x = x + self.slot_embedding[0, 0, :rows] + self.rank_embedding[0, 0]
        x, bias = x.flatten(-3, -2), self.bias(rows)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.output_norm(x).unflatten(-2, (rows, -1))
        anchor = self.anchor_norm(self.context_proj(block.before.to(x.dtype)))
        beside = anchor[..., None, None, :].expand_as(x)
        factors = F.silu(self.factor_input_proj(torch.cat([x, beside, x * beside], dim=-1)))
        out, into = (self.unit(head(factors)) for head in (self.out_head, self.in_head))
        start = self.unit(self.anchor_out_head(anchor))[..., None, None, :].expand_as(
            out[..., :1, :, :]
        )
        before = torch.cat([start, out[..., :-1, :, :]], dim=-3)
        return self.scale * (before @ into.transpose(-1, -2)).float()

    def unit(self, x: Tensor) -> Tensor:
        """Vectors [..., f] by their lengths."""
        return x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps)

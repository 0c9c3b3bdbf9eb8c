"""The corrected hidden states in plain PyTorch, and served.

pytest tests/unit/test_heads.py tests/engine/test_formats.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads import Ranked, Ranking
from vllm_dflash.heads.correction import PART, own_tensors, width
from vllm_dflash.heads.reference import Block, ReferenceHead
from vllm_dflash.models.parameters import ServedHead, load_into
from vllm_dflash.reference.drafter import RMSNorm

_FIRST_SCALE = 0.002
"""Standard deviation of the last matrix at first: the head begins nearly as argmax."""


class HiddenCorrection(nn.Module):
    """What is added to a hidden state."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, width(config)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.embed_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(2 * hidden, inner, bias=False)
        self.up_proj = nn.Linear(2 * hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        nn.init.normal_(self.down_proj.weight, 0, _FIRST_SCALE)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """``hidden`` and the embeddings of the tokens before, both [..., H] -> [..., H]."""
        embedded = self.embed_norm(embedded.to(hidden.dtype))
        x = torch.cat([self.hidden_norm(hidden), embedded], dim=-1)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Reference(ReferenceHead):
    """In plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.hidden_correction: HiddenCorrection | None = None
        if config.head["enable_hidden_correction"]:
            self.hidden_correction = HiddenCorrection(config)

    def scores(self, block: Block, before: Tensor) -> Tensor:
        if self.hidden_correction is None:
            return block.logits
        assert block.embed is not None
        assert block.rank is not None
        correction = self.hidden_correction(block.hidden, block.embed(before))
        return block.rank(block.hidden + correction)


class Served(ServedHead):
    """The same for vLLM, whole on every rank."""

    def __init__(self, config: DrafterConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.corrects = config.rms_norm_eps, config.head["enable_hidden_correction"]
        for name, shape in own_tensors(config).items():
            empty = torch.empty(shape, dtype=dtype)
            self.register_parameter(_attribute(name), nn.Parameter(empty, requires_grad=False))

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes one of the tensors of ``own_tensors``; others are not needed."""
        if name.startswith(f"{PART}."):
            load_into(getattr(self, _attribute(name)), tensor)

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: Ranking) -> Ranked:
        """lm_head runs row after row: that is what this head costs."""
        before, tokens, probable = anchors.long(), [], []
        for row in hidden.view(-1, k, hidden.shape[-1]).unbind(1):
            logits = ranking.logits(self._corrected(row, before, ranking)).float()
            before = ranking.argmax(logits)
            tokens.append(before)
            if ranking.confident:
                probable.append(logits.softmax(-1).gather(1, before[:, None])[:, 0])
        drafted = torch.stack(tokens, 1)
        return drafted, torch.stack(probable, 1) if ranking.confident else None

    def _corrected(self, row: Tensor, before: Tensor, ranking: Ranking) -> Tensor:
        """Hidden states [B, H] after the tokens ``before`` [B]."""
        if not self.corrects:
            return row.contiguous()
        assert ranking.embed is not None
        part, size = self._parameters, row.shape[-1:]
        x = torch.cat(
            [
                F.rms_norm(row, size, part["hidden_norm"], self.eps),
                F.rms_norm(ranking.embed(before).to(row.dtype), size, part["embed_norm"], self.eps),
            ],
            dim=-1,
        )
        gate, up, down = (part[f"{name}_proj"] for name in ("gate", "up", "down"))
        assert gate is not None
        assert up is not None
        assert down is not None
        return row + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _attribute(name: str) -> str:
    return name.removeprefix(f"{PART}.").removesuffix(".weight")

"""The Markov head and its confidence head in plain PyTorch, and served.

pytest tests/unit/test_heads.py tests/engine/test_formats.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads import Ranked, Ranking
from vllm_dflash.heads.markov import own_tensors
from vllm_dflash.heads.reference import Block, Lesson, ReferenceHead, cross_entropy
from vllm_dflash.models.parameters import ServedTensors

_FIRST_SCALE = 0.02
"""Standard deviation of both matrices at first: the bias begins near nothing."""


class MarkovHead(nn.Module):
    """The two matrices."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank = config.head["markov_rank"]
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False)
        for weight in (self.markov_w1.weight, self.markov_w2.weight):
            nn.init.normal_(weight, 0, _FIRST_SCALE)


class ConfidenceHead(nn.Module):
    """Whether a token will be accepted."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.with_markov = config.head["confidence_head_with_markov"]
        rank = config.head["markov_rank"] if self.with_markov else 0
        self.proj = nn.Linear(config.hidden_size + rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """``hidden`` [..., H] and ``W1[a]`` [..., r] -> log-odds [...] float32."""
        x = torch.cat([hidden, embedded], -1) if self.with_markov else hidden
        return F.linear(x.float(), self.proj.weight.float(), self.proj.bias.float())[..., 0]


class Reference(ReferenceHead):
    """In plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.markov_head = MarkovHead(config)
        self.confidence_head: ConfidenceHead | None = None
        if config.head["enable_confidence_head"]:
            self.confidence_head = ConfidenceHead(config)

    def scores(self, block: Block, before: Tensor) -> Tensor:
        head = self.markov_head
        return block.logits + head.markov_w2(head.markov_w1(before)).float()

    def confidences(self, block: Block, before: Tensor) -> Tensor | None:
        """Log-odds [...] float32 that each row's token is accepted; None without that head."""
        if self.confidence_head is None:
            return None
        return self.confidence_head(block.hidden, self.markov_head.markov_w1(before))

    def lesson(self, block: Block, before: Tensor, labels: Tensor) -> Lesson:
        """The scores' cross-entropy; the confidence head learns whether they are right.

        It learns alone: what it reads is not changed for its sake.
        """
        scores = self.scores(block, before)
        losses, tokens = cross_entropy(scores, labels), scores.detach().argmax(-1)
        if self.confidence_head is None:
            return Lesson(losses, 0.0, tokens)
        odds = self.confidence_head(
            block.hidden.detach(), self.markov_head.markov_w1(before).detach()
        )
        right = (tokens == labels).float()
        learned = F.binary_cross_entropy_with_logits(odds, right, reduction="none")
        return Lesson(losses, learned, tokens)


class Served(ServedTensors):
    """The same for vLLM."""

    def __init__(self, config: DrafterConfig, dtype: torch.dtype) -> None:
        super().__init__(own_tensors(config), dtype, float32="confidence_head.")
        self.has_confidence = config.head["enable_confidence_head"]
        self.with_markov = config.head["confidence_head_with_markov"]

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: Ranking) -> Ranked:
        """Without a confidence head a token's probability is that of its scores."""
        w1, w2 = (self.own(f"markov_head.markov_{name}.weight") for name in ("w1", "w2"))
        logits = ranking.logits(hidden).float().view(-1, k, w2.shape[0])
        before = anchors.long()
        tokens, embedded, probable = [], [], []
        for row in logits.unbind(1):
            embedded.append(w1[before])
            scores = row + F.linear(embedded[-1], w2).float()
            before = ranking.argmax(scores)
            tokens.append(before)
            if ranking.confident and not self.has_confidence:
                probable.append(scores.softmax(-1).gather(1, before[:, None])[:, 0])
        drafted = torch.stack(tokens, 1)
        if not ranking.confident:
            return drafted, None
        if not self.has_confidence:
            return drafted, torch.stack(probable, 1)
        x = hidden.view(len(drafted), k, -1)
        if self.with_markov:
            x = torch.cat([x, torch.stack(embedded, 1)], -1)
        weight, bias = (self.own(f"confidence_head.proj.{name}") for name in ("weight", "bias"))
        odds = F.linear(x.float(), weight, bias)
        return drafted, odds[..., 0].sigmoid()

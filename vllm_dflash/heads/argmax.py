"""Each row's token is the best by its own logits: all tokens of a block at once.

pytest tests/unit/test_kinds.py
"""

from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.heads import Ranked, Ranking
from vllm_dflash.heads.reference import Block, ReferenceHead
from vllm_dflash.models.parameters import ServedHead


class Reference(ReferenceHead):
    """In plain PyTorch."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()

    def scores(self, block: Block, before: Tensor) -> Tensor:
        return block.logits

    def draft(self, block: Block, anchors: Tensor) -> tuple[Tensor, Tensor]:
        return block.logits.argmax(-1), block.logits


class Served(ServedHead):
    """The same for vLLM."""

    def __init__(self, config: DrafterConfig, dtype: object) -> None:
        super().__init__()

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint: nothing."""

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: Ranking) -> Ranked:
        if not ranking.confident:
            return ranking.best(hidden).view(-1, k), None
        logits = ranking.logits(hidden).float()
        tokens = ranking.argmax(logits)
        if ranking.likely is not None:
            logits = ranking.likely(logits)
        return tokens.view(-1, k), logits.softmax(-1).gather(1, tokens[:, None]).view(-1, k)

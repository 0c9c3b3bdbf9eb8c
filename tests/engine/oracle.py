"""The plain PyTorch reference as the oracle of what an engine drafted; calls none of the code that it checks."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engine.harness import Batch
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import replay_drafts

BFLOAT16_GAP = 2 * 2.0**-8
"""Two steps of a bfloat16 logit, relative to it: below, which of two logits is larger is rounding, and not even the reference in
bfloat16 agrees with itself in float32 (99.0 % of the embedded pair's draft tokens; the engine in bfloat16: 99.0 % too)."""


@dataclass
class Agreement:
    """How an engine's drafts compare with the oracle's."""

    drafts: int = 0
    tokens: int = 0
    differences: list[float] = field(default_factory=list)
    """The oracle's logit gap (top 1 less top 2), relative to the top logit, wherever the tokens differ."""

    @property
    def share(self) -> float:
        return 1 - len(self.differences) / self.tokens

    def share_beyond(self, gap: float) -> float:
        """Share of tokens that agree, or differ where the relative logit gap is at most ``gap``."""
        return 1 - sum(d > gap for d in self.differences) / self.tokens


def compare_drafts(
    batch: Batch, target: Path, drafter: Path, dtype: torch.dtype, num_speculative_tokens: int, max_model_len: int | None = None
) -> Agreement:
    """Replays every recorded draft in plain PyTorch and compares token by token."""
    model, draft_model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype), load_drafter(drafter, dtype)
    by_sequence: dict[tuple[int, ...], list[dict]] = {}
    for sequence, draft in batch.drafts:
        assert sequence[draft["anchor"]] == draft["token"], "the draft's anchor is not the sequence's token"
        by_sequence.setdefault(tuple(sequence), []).append(draft)
    result = Agreement()
    for sequence, drafts in by_sequence.items():
        expected = replay_drafts(model, draft_model, sequence, [d["anchor"] for d in drafts], num_speculative_tokens, max_model_len)
        for draft, oracle in zip(drafts, expected, strict=True):
            result.drafts += 1
            for ours, theirs, gap, top in zip(draft["draft"], oracle.tokens, oracle.gaps, oracle.tops, strict=False):
                result.tokens += 1
                if ours != theirs:
                    result.differences.append(gap / max(abs(top), 1e-9))
    return result

"""The plain PyTorch reference as the oracle of what an engine drafted; calls none of the code that
it checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.harness import Batch
from engine.rounding import Kernels, RoundedDrafter, RoundedTarget, replay_rounded
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import replay_drafts

BFLOAT16_GAP = 2 * 2.0**-8
"""Two steps of a bfloat16 logit, relative to it: below, which of two logits is larger is
rounding."""


@dataclass
class Agreement:
    """How an engine's drafts compare with the oracle's."""

    drafts: int = 0
    tokens: int = 0
    differences: list[float] = field(default_factory=list)
    """The oracle's logit gap (top 1 less top 2), relative to the top logit, wherever the tokens
    differ."""

    def add(self, tokens: Sequence[int], oracle: Any) -> None:
        """Takes in one draft, and what the oracle drafts there."""
        self.drafts += 1
        for ours, theirs, gap, top in zip(
            tokens, oracle.tokens, oracle.gaps, oracle.tops, strict=False
        ):
            self.tokens += 1
            if ours != theirs:
                self.differences.append(gap / max(abs(top), 1e-9))

    @property
    def share(self) -> float:
        return 1 - len(self.differences) / self.tokens

    def share_beyond(self, gap: float) -> float:
        """Share of tokens that agree, or differ where the relative logit gap is at most ``gap``."""
        return 1 - sum(d > gap for d in self.differences) / self.tokens


def compare_drafts(
    batch: Batch,
    target: Path,
    drafter: Path,
    dtype: torch.dtype,
    num_speculative_tokens: int,
    max_model_len: int | None = None,
) -> Agreement:
    """Replays every recorded draft in plain PyTorch and compares token by token."""
    result = Agreement()
    for sequence, drafts in _by_sequence(batch).items():
        anchors = tuple(d["anchor"] for d in drafts)
        expected = _replayed(
            target, drafter, dtype, sequence, anchors, num_speculative_tokens, max_model_len
        )
        for draft, oracle in zip(drafts, expected, strict=True):
            result.add(draft["draft"], oracle)
    return result


def compare_bfloat16(
    batch: Batch, target: Path, drafter: Path, num_speculative_tokens: int
) -> tuple[Agreement, Agreement]:
    """How an engine's drafts in bfloat16, and how the reference's in bfloat16, agree with the
    reference in float32.

    How often rounding alone changes a draft depends on the weights and on the processor; the second
    figure is that, for the same drafts on this machine, and an engine in bfloat16 that does the
    same computation has about the same.
    """
    served, reference = Agreement(), Agreement()
    for sequence, drafts in _by_sequence(batch).items():
        anchors = tuple(d["anchor"] for d in drafts)
        replays = (
            _replayed(target, drafter, dtype, sequence, anchors, num_speculative_tokens, None)
            for dtype in (torch.float32, torch.bfloat16)
        )
        for draft, oracle, again in zip(drafts, *replays, strict=True):
            served.add(draft["draft"], oracle)
            reference.add(again.tokens, oracle)
    return served, reference


def compare_rounded(
    batch: Batch, target: Path, drafter: Path, num_speculative_tokens: int
) -> Agreement:
    """The same for the V1 engine in bfloat16, beside a computation in plain PyTorch that rounds
    where the engine does."""
    kernels = Kernels.here(norm_context_keys=True)
    models = RoundedTarget(target, kernels), RoundedDrafter(drafter, kernels)
    result = Agreement()
    for sequence, drafts in _by_sequence(batch).items():
        expected = replay_rounded(
            *models, sequence, [d["anchor"] for d in drafts], num_speculative_tokens
        )
        for draft, oracle in zip(drafts, expected, strict=True):
            result.add(draft["draft"], oracle)
    return result


@cache
def _models(target: Path, drafter: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(target, dtype=dtype), load_drafter(drafter, dtype)


@cache
def _replayed(
    target: Path,
    drafter: Path,
    dtype: torch.dtype,
    sequence: tuple[int, ...],
    anchors: tuple[int, ...],
    num_draft_tokens: int,
    limit: int | None,
) -> list[Any]:
    """The reference's drafts at given anchors of a sequence; kept, as engines of several batch
    sizes draft at the same ones."""
    return replay_drafts(
        *_models(target, drafter, dtype), sequence, anchors, num_draft_tokens, limit
    )


def _by_sequence(batch: Batch) -> dict[tuple[int, ...], list[dict]]:
    found: dict[tuple[int, ...], list[dict]] = {}
    for sequence, draft in batch.drafts:
        assert sequence[draft["anchor"]] == draft["token"], (
            "the draft's anchor is not the sequence's token"
        )
        found.setdefault(tuple(sequence), []).append(draft)
    return found

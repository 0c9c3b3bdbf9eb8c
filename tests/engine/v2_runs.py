"""What engines under ``v2_jobs`` drafted, beside plain PyTorch's drafts at the same anchors:
the reference's in float32, those of ``rounding`` in bfloat16."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.oracle import BFLOAT16_GAP
from engine.rounding import Kernels, RoundedDrafter, RoundedTarget, replay_rounded
from engine.v2_jobs import Draft, Job, Result
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import replay_drafts

Select = Callable[[list[int], Draft], bool]
"""Whether a draft of a prompt is to be compared."""


@dataclass(frozen=True)
class Pair:
    """One drafted token beside plain PyTorch's, with that one's logit and lead over the second."""

    served: int
    reference: int
    gap: float
    top: float

    @property
    def differs_beyond_rounding(self) -> bool:
        return self.served != self.reference and self.gap > BFLOAT16_GAP * abs(self.top)


@dataclass(frozen=True)
class Runs:
    """The engines' jobs and results, by their place in the list."""

    jobs: list[Job]
    results: list[Result]
    compared: dict[int, list[tuple[int, Draft, list[Pair]]]] = field(default_factory=dict)
    """What ``compare`` has found for a run: prompt, draft, pairs."""

    def drafts(
        self, run: int, only: Collection[int] | None = None
    ) -> Iterator[tuple[list[int], list[int], list[Draft]]]:
        """Per finished completion (of the prompts ``only``): prompt, committed sequence, drafts
        whose anchors are part of it."""
        result = self.results[run]
        for i, (prompt, completions, drafts) in enumerate(
            zip(result.prompts, result.completions, result.drafts, strict=True)
        ):
            if only is None or i in only:
                for number, output in enumerate(completions):
                    tokens = prompt + output
                    yield (
                        prompt,
                        tokens,
                        [
                            draft
                            for draft in drafts
                            if draft.completion == number and draft.anchor < len(tokens)
                        ],
                    )

    def compare(
        self,
        run: int,
        select: Select = lambda prompt, draft: True,
        only: Collection[int] | None = None,
    ) -> list[list[Pair]]:
        """Every selected draft, token by token, beside the reference's draft at the same anchor."""
        if run not in self.compared:
            self.compared[run] = list(self._compare(run))
        return [
            pairs
            for i, draft, pairs in self.compared[run]
            if (only is None or i in only) and select(self.results[run].prompts[i], draft)
        ]

    def _compare(self, run: int) -> Iterator[tuple[int, Draft, list[Pair]]]:
        job = self.jobs[run]
        replay = _oracle(job)
        for i in range(len(job.prompts)):
            for _, tokens, drafts in self.drafts(run, [i]):
                anchors = [draft.anchor for draft in drafts]
                references = replay(
                    tokens, anchors, job.num_speculative_tokens, self.results[run].max_model_len
                )
                for served, reference in zip(drafts, references, strict=True):
                    assert served.anchor_token == tokens[served.anchor]
                    # The reference drafts no further than max_model_len; the engine's tokens past
                    # it are never scheduled.
                    yield (
                        i,
                        served,
                        [
                            Pair(*row)
                            for row in zip(
                                served.tokens, reference.tokens, reference.gaps, reference.tops
                            )
                        ],
                    )

    def differences(
        self,
        run: int,
        select: Select = lambda prompt, draft: True,
        only: Collection[int] | None = None,
    ) -> list[Pair]:
        """The selected drafts' tokens that are not the reference's; an error where no token was
        selected."""
        pairs = [pair for draft in self.compare(run, select, only) for pair in draft]
        assert pairs, "no drafted token was selected: nothing would be tested"
        return [pair for pair in pairs if pair.served != pair.reference]


def _oracle(job: Job) -> Callable[..., list[Any]]:
    """What drafts in plain PyTorch at the anchors of a sequence, in the job's dtype."""
    assert job.drafter is not None
    target, drafter = Path(job.target), Path(job.drafter)
    if job.dtype == "bfloat16":
        kernels = Kernels.here(norm_context_keys=False)
        return partial(
            replay_rounded, RoundedTarget(target, kernels), RoundedDrafter(drafter, kernels)
        )
    return partial(
        replay_drafts,
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval(),
        load_drafter(drafter, torch.float32),
    )

"""Ways to break the rule of acceptance inside an engine: a test of lossless sampling that passes
under one of them tests nothing.

Each takes the ``LLM`` and holds while its context is open.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch


@contextmanager
def accept_every_draft(llm: Any) -> Iterator[None]:
    import torch

    from vllm_dflash.cpu import verification

    def zeros(
        num_tokens: int, num_draft_tokens: list[int], generators: dict[int, Any], device: Any
    ) -> Any:
        return torch.zeros(num_tokens, dtype=torch.float64, device=device)

    keep = verification.keep_accepted

    def keep_all(sampled: Any, drafts: Any, counts: Any) -> Any:
        sampled, row, at = list(sampled), 0, 0
        for count in counts:
            sampled[row : row + count] = drafts[at : at + count]
            row, at = row + count + 1, at + count
        return keep(sampled, drafts, counts)

    with (
        patch("vllm.v1.sample.rejection_sampler.generate_uniform_probs", zeros),
        patch.object(verification, "keep_accepted", keep_all),
    ):
        yield


@contextmanager
def accept_by_the_target_alone(llm: Any) -> Iterator[None]:
    """Accepts with the target's probability p instead of p / q; what is rejected is still drawn
    from the rest of p over q."""
    import torch
    from vllm.v1.sample import rejection_sampler

    rule = rejection_sampler._rejection_random_sample

    def without_q(output: Any, cu: Any, drafts: Any, draft_probs: Any, *rest: Any) -> None:
        # None after a step whose requests were all greedy.
        rule(
            output, cu, drafts, None if draft_probs is None else torch.ones_like(draft_probs), *rest
        )

    with patch("vllm.v1.sample.rejection_sampler._rejection_random_sample", without_q):
        yield


@contextmanager
def draw_the_rejected_from_the_target(llm: Any) -> Iterator[None]:
    """Draws what takes a rejected draft's place from p, not from what of p is left over q."""
    from vllm_dflash.cpu import verification

    def from_p(
        max_spec_len: int,
        counts: Any,
        cu: Any,
        draft_token_ids: Any,
        draft_probs: Any,
        target_probs: Any,
        *rest: Any,
    ) -> Any:
        return target_probs.multinomial(1).flatten().to(draft_token_ids.dtype)

    sample, keep, second = verification.Verifier._sample, verification.keep_accepted, []

    def sample_twice(self: Any, metadata: Any, logits: Any, sampling: Any) -> Any:
        second[:] = sample(self, metadata, logits.clone(), sampling)[0].tolist()
        return sample(self, metadata, logits, sampling)

    def keep_and_draw_again(sampled: Any, drafts: Any, counts: Any) -> Any:
        kept, row = keep(sampled, drafts, counts), 0
        for tokens, count in zip(kept, counts, strict=True):
            accepted = sum(token >= 0 for token in tokens) - 1
            if accepted < count:
                tokens[accepted] = second[row + accepted]
            row += count + 1
        return kept

    with (
        patch("vllm.v1.sample.rejection_sampler.sample_recovered_tokens", from_p),
        patch.object(verification.Verifier, "_sample", sample_twice),
        patch.object(verification, "keep_accepted", keep_and_draw_again),
    ):
        yield


@contextmanager
def probabilities_of_another_position(llm: Any) -> Iterator[None]:
    """The proposer's probabilities in the reverse order of its drafts: what a wrong view of them
    would be."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    drafter = executor.driver_worker.worker.model_runner.drafter
    take = drafter.take_last_draft_probs

    def flipped() -> Any:
        probs = take()
        return None if probs is None else probs.flip(1)

    with patch.object(drafter, "take_last_draft_probs", flipped):
        yield


@contextmanager
def one_temperature_for_all(llm: Any) -> Iterator[None]:
    """Every draft is verified at the batch's first temperature: requests' settings in the wrong
    rows."""
    from dataclasses import replace

    from vllm.v1.sample import rejection_sampler

    from vllm_dflash.cpu.verification import Verifier

    expand, sample = rejection_sampler.expand_batch_to_tokens, Verifier._sample

    def first(x: Any, *rest: Any, **keywords: Any) -> Any:
        return expand(x[:1].expand_as(x), *rest, **keywords)

    def sample_at_first(self: Any, metadata: Any, logits: Any, sampling: Any) -> Any:
        if sampling.temperature is not None:
            sampling = replace(
                sampling, temperature=sampling.temperature[:1].expand_as(sampling.temperature)
            )
        return sample(self, metadata, logits, sampling)

    with (
        patch("vllm.v1.sample.rejection_sampler.expand_batch_to_tokens", first),
        patch.object(Verifier, "_sample", sample_at_first),
    ):
        yield


def _as_it_is(llm: Any) -> AbstractContextManager[None]:
    return nullcontext()


RULES = {
    None: _as_it_is,
    "accept every draft": accept_every_draft,
    "accept by the target alone": accept_by_the_target_alone,
    "draw the rejected from the target": draw_the_rejected_from_the_target,
    "probabilities of another position": probabilities_of_another_position,
    "one temperature for all": one_temperature_for_all,
}

"""Verification on vLLM's V1 runner on a CPU: the target's own token at every row, and the drafts that are equal to it.

A greedy draft is a point mass, so to sample the target's token and accept the draft if it is that token has the same distribution as
to accept it with the target's probability and else sample from the rest (arXiv 2211.17192, with q a point mass). It takes one pass over
the logits. And the noise of an output token then depends on its request's seed and its own place alone, not on how many tokens were
drafted: a seed gives what it gives without a drafter. Limits: greedy drafts; sampled ones are verified by vLLM's own class.

    pytest tests/unit/test_verification.py tests/engine/test_sampling.py tests/engine/test_features.py
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_dflash.drafting.sampling import SeedDraws, draw_tokens

_GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as vLLM's sampler has it."""


class Verifier(RejectionSampler):
    """Stands in the runner's place for vLLM's rejection sampler; ``runner`` is the V1 model runner."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self._runner, self._draws = runner, SeedDraws()
        self.last: tuple[torch.Tensor | None, list[int], list[int]] = None, [], []
        """What ``forward`` returned last where drafts were verified, each request's last kept token, and how many were kept."""

    def forward(
        self, metadata: SpecDecodeMetadata, draft_probs: torch.Tensor | None, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> SamplerOutput:  # fmt: skip
        """Verifies each request's drafts and samples one token more.

        Args:
            draft_probs: None for greedy drafts; else vLLM's own class does all.
            logits: [R, V], a request's rows one after the other: one for each of its drafts and one more.

        Returns:
            Token ids [B, longest draft + 1] int32, rejected ones -1, and their log probabilities where asked for.
        """
        if draft_probs is not None or self.synthetic_mode:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        processed = self._process(metadata, logits, sampling_metadata)
        sampled, processed = self._sample(metadata, processed, sampling_metadata)
        if metadata.max_spec_len:
            kept = keep_accepted(sampled.tolist(), metadata.draft_token_ids.tolist(), metadata.num_draft_tokens)
            output = torch.tensor(kept, dtype=torch.int32)
            counts = [len(row) - row.count(PLACEHOLDER_TOKEN_ID) for row in kept]
            self.last = output, [row[count - 1] for row, count in zip(kept, counts, strict=True)], counts
        else:
            output = sampled.to(torch.int32)[:, None]
        if sampling_metadata.max_num_logprobs is None:
            return SamplerOutput(sampled_token_ids=output, logprobs_tensors=None)
        shown = processed if self.is_processed_logprobs_mode else logits
        logprobs = self._get_logprobs_tensors(
            sampling_metadata.max_num_logprobs, metadata, logits, shown[metadata.target_logits_indices],
            shown[metadata.bonus_logits_indices], output,
        )  # fmt: skip
        return SamplerOutput(sampled_token_ids=output, logprobs_tensors=logprobs)

    def _process(self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata) -> torch.Tensor:
        """Logits [R, V] float32 after penalties, bad words, allowed tokens and ``min_tokens``; the argument stays as it is."""
        if not _has_processors(sampling):
            return logits.to(torch.float32)
        after_drafts = _min_tokens_after(metadata.num_draft_tokens, sampling)
        bonus = self.sampler.apply_logits_processors(logits[metadata.bonus_logits_indices].to(torch.float32), after_drafts, True)
        if not metadata.max_spec_len:
            return bonus
        target = self.apply_logits_processors(logits[metadata.target_logits_indices].to(torch.float32), sampling, metadata)
        processed = torch.empty(logits.shape, dtype=torch.float32)
        processed[metadata.bonus_logits_indices], processed[metadata.target_logits_indices] = bonus, target
        return processed

    def _sample(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The target's token at each row [R], and the logits [R, V] that it was sampled from."""
        greedy = None if sampling.all_random else self.sampler.greedy_sample(logits)
        if sampling.all_greedy:
            return greedy, logits
        temperature, top_k, top_p = self._by_row(metadata, sampling)
        if greedy is not None:
            temperature = temperature.masked_fill(is_greedy := temperature < _GREEDY_BELOW, 1.0)
        # In place where nobody is shown them: they are as large as the batch's vocabularies.
        scaled = (logits.div_ if sampling.max_num_logprobs is None else logits.div)(temperature[:, None])
        scaled = apply_top_k_top_p(scaled, top_k, top_p)
        seeded, seeds = self._seeded(metadata.num_draft_tokens, sampling)
        if len(seeded) == len(scaled):
            sampled = torch.ops._C.fused_gumbel_argmax(scaled, torch.tensor(seeds))
        else:
            sampled = draw_tokens(scaled)
            if seeded:
                sampled[seeded] = torch.ops._C.fused_gumbel_argmax(scaled[seeded], torch.tensor(seeds))
        return sampled if greedy is None else torch.where(is_greedy, greedy, sampled), scaled

    @staticmethod
    def _by_row(metadata: SpecDecodeMetadata, sampling: SamplingMetadata) -> list[Any]:
        """Temperature, top-k and top-p of each row [R]; None for a setting that no request has."""
        settings = [sampling.temperature, sampling.top_k, sampling.top_p]
        if not metadata.max_spec_len:
            return settings
        counts = torch.tensor(metadata.num_draft_tokens) + 1
        rows = len(counts) + sum(metadata.num_draft_tokens)
        return [None if setting is None else setting.repeat_interleave(counts, output_size=rows) for setting in settings]

    def _seeded(self, num_draft_tokens: Sequence[int], sampling: SamplingMetadata) -> tuple[list[int], list[int]]:
        """The rows of requests with a seed, and what vLLM's sampler seeds each one's noise with, by the seed and the token's place."""
        rows: list[int] = []
        seeds: list[int] = []
        if not sampling.generators:
            return rows, seeds
        requests, request_ids, first = self._runner.requests, self._runner.input_batch.req_ids, 0
        for row, drafts in enumerate(num_draft_tokens):
            if row in sampling.generators:
                request = requests[request_ids[row]]
                place = len(request.output_token_ids)
                rows += range(first, first + drafts + 1)
                seeds += self._draws.at(request_ids[row], request.sampling_params.seed, range(place, place + drafts + 1))
            first += drafts + 1
        self._draws.forget_all_but(requests)
        return rows, seeds


def _has_processors(sampling: SamplingMetadata) -> bool:
    """Whether a request of the batch changes its logits before they are ranked. vLLM refuses the other processors with a drafter."""
    holder = sampling.thinking_budget_state_holder
    return bool(
        not sampling.no_penalties
        or sampling.bad_words_token_ids
        or sampling.allowed_token_ids_mask is not None
        or any(isinstance(p, MinTokensLogitsProcessor) and p.min_toks for p in sampling.logitsprocs.non_argmax_invariant)
        or (holder is not None and holder.has_tracked_requests())
    )


def _min_tokens_after(num_draft_tokens: Sequence[int], sampling: SamplingMetadata) -> SamplingMetadata:
    """A copy that leaves stop tokens alone in the row after the drafts, where ``min_tokens`` are reached once all of those are accepted.

    vLLM counts committed tokens only, and would forbid a stop token there that the target may choose.
    """
    processors = sampling.logitsprocs.non_argmax_invariant
    if not any(isinstance(p, MinTokensLogitsProcessor) and p.min_toks for p in processors):
        return sampling
    logitsprocs = copy.copy(sampling.logitsprocs)
    logitsprocs.non_argmax_invariant = [
        _reaching(p, num_draft_tokens) if isinstance(p, MinTokensLogitsProcessor) else p for p in processors
    ]
    return replace(sampling, logitsprocs=logitsprocs)


def _reaching(processor: MinTokensLogitsProcessor, num_draft_tokens: Sequence[int]) -> MinTokensLogitsProcessor:
    """A copy without the rows whose ``min_tokens`` their drafts reach."""
    reached = [row for row, (least, out, *_) in processor.min_toks.items() if len(out) + num_draft_tokens[row] >= least]
    done = torch.tensor(reached, dtype=torch.int32)
    short = copy.copy(processor)
    short.logits_slice = _without(done, processor.logits_slice)
    short.restore_logits_slice = _without(done, processor.restore_logits_slice)
    return short


def _without(done: torch.Tensor, part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = part
    kept = ~torch.isin(rows, done)
    return rows[kept], tokens[kept]


def keep_accepted(sampled: Sequence[int], drafts: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Each request's accepted drafts and the target's token after them, filled up with -1 to the longest draft plus one.

    Args:
        sampled: [R] the target's token at each row, ``counts[i] + 1`` rows a request.
        drafts: [R - B] draft tokens, ``counts[i]`` a request.
        counts: [B] drafts of each request.
    """
    width, row, at, kept = max(counts) + 1, 0, 0, []
    for count in counts:
        accepted = 0
        while accepted < count and sampled[row + accepted] == drafts[at + accepted]:
            accepted += 1
        kept.append([*sampled[row : row + accepted + 1], *[PLACEHOLDER_TOKEN_ID] * (width - accepted - 1)])
        row, at = row + count + 1, at + count
    return kept


class DraftMetadata:
    """In place of a runner's ``_calc_spec_decode_metadata`` on a CPU: the same without a tensor operator."""

    def __init__(self, input_ids: np.ndarray, max_num_reqs: int) -> None:
        """``input_ids``: the runner's buffer of the step's tokens."""
        self._input_ids = input_ids
        self._order, self._zeros = torch.arange(max_num_reqs + 1, dtype=torch.int32), torch.zeros(max_num_reqs, dtype=torch.int32)
        self._decoding: dict[int, SpecDecodeMetadata] = {}

    def __call__(self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray) -> SpecDecodeMetadata:
        """By request [B] int32, its drafts, and the end of its rows in the step's."""
        count = len(num_draft_tokens)
        if not num_draft_tokens.any():
            if cu_num_scheduled_tokens[-1] > count:
                return self._without_drafts(count, torch.from_numpy(cu_num_scheduled_tokens - 1))
            known = self._decoding.get(count)
            if known is None:
                known = self._decoding[count] = self._without_drafts(count, self._order[:count])
            return known
        num_sampled = num_draft_tokens + 1
        ends = num_sampled.cumsum(dtype=np.int32)
        rows = np.arange(ends[-1], dtype=np.int32) + np.repeat(cu_num_scheduled_tokens - ends, num_sampled)
        is_draft = np.ones(len(rows), dtype=bool)
        is_draft[ends - 1] = False
        target = is_draft.nonzero()[0].astype(np.int32)
        return SpecDecodeMetadata(
            draft_token_ids=torch.from_numpy(self._input_ids[rows[target] + 1]),
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=torch.from_numpy(num_draft_tokens.cumsum(dtype=np.int32)),
            cu_num_sampled_tokens=torch.from_numpy(ends),
            target_logits_indices=torch.from_numpy(target),
            bonus_logits_indices=torch.from_numpy(ends - 1),
            logits_indices=torch.from_numpy(rows),
        )

    def _without_drafts(self, count: int, last_rows: torch.Tensor) -> SpecDecodeMetadata:
        return SpecDecodeMetadata(
            draft_token_ids=self._zeros[:0],
            num_draft_tokens=[0] * count,
            cu_num_draft_tokens=self._zeros[:count],
            cu_num_sampled_tokens=self._order[1 : count + 1],
            target_logits_indices=self._order[:0],
            bonus_logits_indices=self._order[:count],
            logits_indices=last_rows,
        )

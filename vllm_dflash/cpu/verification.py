"""Verification on vLLM's V1 runner on a CPU: the target's own token at every row, and the drafts
that are equal to it.

A greedy draft is a point mass, so to sample the target's token and accept the draft if it is that
token has the same distribution as to accept it with the target's probability and else sample from
the rest (arXiv 2211.17192, with q a point mass). It takes one pass over the logits. And the noise
of an output token then depends on its request's seed and its own place alone, not on how many
tokens were
drafted: a seed gives what it gives without a drafter. Limits: greedy drafts; sampled ones are
verified by vLLM's own class.

    pytest tests/unit/test_verification.py tests/engine/test_sampling.py
    pytest tests/engine/test_features.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.sampler import _SAMPLING_EPS as GREEDY_BELOW
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_dflash.cpu.rows import Rows, ThinkingBudgets, each_row_alone, without_processors
from vllm_dflash.cpu.sampler_choice import check_sampler, draws_by_kernel, is_as_checked, named
from vllm_dflash.cpu.sampling import DrawsInTurn, SeedDraws, Seeded, draw_tokens, int32
from vllm_dflash.log import logger


class Verifier(RejectionSampler):
    """Stands in the runner's place for vLLM's rejection sampler; ``runner`` is the V1 model
    runner."""

    def __init__(self, runner: Any) -> None:
        check_sampler(runner.sampler)
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self._runner, self._draws = runner, SeedDraws()
        self._earlier: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()
        """By a streaming session's generator, the tokens drawn for its earlier inputs."""
        drawn_by = runner.sampler.topk_topp_sampler
        self._in_turn = None if draws_by_kernel(drawn_by) else DrawsInTurn(drawn_by)
        if self._in_turn is not None:
            logger.info(
                "vLLM draws tokens by %s here: drafts of sampled requests are verified by it too",
                named(drawn_by.forward),
            )
        self._budgets: ThinkingBudgets | None = None
        self.last: tuple[torch.Tensor | None, list[int], list[int]] = None, [], []
        """What ``forward`` returned last where drafts were verified, each request's last kept
        token, and how many were kept."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verifies each request's drafts and samples one token more.

        Args:
            draft_probs: None for greedy drafts; else vLLM's own class accepts and samples.
            logits: [R, V], a request's rows one after the other: one for each of its drafts and one
                more.

        Returns:
            Token ids [B, longest draft + 1] int32, rejected ones -1, and their log probabilities
            where asked for.
        """
        if self._runner.sampler is not self.sampler or not is_as_checked(self.sampler):
            check_sampler(self._runner.sampler)
        if self.synthetic_mode:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        if draft_probs is not None:
            return self._reject(metadata, draft_probs, logits, sampling_metadata)
        processed = self._process(metadata, logits, sampling_metadata)
        sampled, processed = self._sample(metadata, processed, sampling_metadata)
        if metadata.max_spec_len:
            kept = keep_accepted(
                sampled.tolist(), metadata.draft_token_ids.tolist(), metadata.num_draft_tokens
            )
            output = int32(kept)
            counts = [len(row) - row.count(PLACEHOLDER_TOKEN_ID) for row in kept]
            self.last = (
                output,
                [row[count - 1] for row, count in zip(kept, counts, strict=True)],
                counts,
            )
        else:
            output = sampled.to(torch.int32)[:, None]
        return SamplerOutput(
            output, self._logprobs(metadata, logits, processed, output, sampling_metadata)
        )

    def _reject(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor,
        logits: torch.Tensor,
        sampling: SamplingMetadata,
    ) -> SamplerOutput:
        """Drafts that were sampled go through vLLM's own class, on logits that have every other
        setting in them already."""
        processed = self._process(metadata, logits, sampling)
        without = replace(
            without_processors(sampling), max_num_logprobs=None, logprob_token_ids=None
        )
        output = super().forward(metadata, draft_probs, processed, without).sampled_token_ids
        if _are_shown(sampling) and self.is_processed_logprobs_mode and not sampling.all_greedy:
            scaled, _, top_k, top_p = self._divided(metadata, processed, sampling)
            processed = apply_top_k_top_p(scaled, top_k, top_p)
        return SamplerOutput(output, self._logprobs(metadata, logits, processed, output, sampling))

    def _logprobs(
        self,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        processed: torch.Tensor,
        output: torch.Tensor,
        sampling: SamplingMetadata,
    ) -> LogprobsTensors | None:
        """Log probabilities of what was kept of ``output`` [B, n], from the logits before or after
        processing, as vLLM is set; or None."""
        shown = processed if self.is_processed_logprobs_mode else logits
        if sampling.logprob_token_ids:
            return self._logprobs_of(sampling.logprob_token_ids, metadata, shown, output)
        if sampling.max_num_logprobs is None:
            return None
        return self._get_logprobs_tensors(
            sampling.max_num_logprobs,
            metadata,
            logits,
            shown[metadata.target_logits_indices],
            shown[metadata.bonus_logits_indices],
            output,
        )

    def _logprobs_of(
        self,
        token_ids: Mapping[int, list[int]],
        metadata: SpecDecodeMetadata,
        shown: torch.Tensor,
        output: torch.Tensor,
    ) -> LogprobsTensors | None:
        """As vLLM's sampler for ``logprob_token_ids``, which its rejection sampler drops: by
        request the tokens that are asked for."""
        width = output.shape[1]
        first = metadata.cu_num_sampled_tokens.long() - torch.tensor(metadata.num_draft_tokens) - 1
        kept = shown[(first[:, None] + torch.arange(width)).clamp(max=len(shown) - 1).flatten()]
        logprobs = (
            kept.to(torch.float32)
            if self.is_logits_logprobs_mode
            else self.sampler.compute_logprobs(kept)
        )
        by_row = {
            request * width + i: ids for request, ids in token_ids.items() for i in range(width)
        }
        return self.sampler.gather_specific_token_logprobs(
            logprobs, by_row, output.flatten().clamp(min=0).long()
        )

    def _process(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
    ) -> torch.Tensor:
        """Logits [R, V] float32 after penalties, bad words, allowed tokens, ``min_tokens`` and
        thinking budgets.

        Each row is treated as plain decoding would treat it after the drafts before it. The
        argument stays as it is.
        """
        if not _has_processors(sampling):
            return logits.to(torch.float32)
        rows = Rows(metadata.num_draft_tokens, metadata.draft_token_ids.tolist())
        processed = self.sampler.apply_logits_processors(
            logits.to(torch.float32, copy=True), each_row_alone(sampling, rows), False
        )
        holder, batch = sampling.thinking_budget_state_holder, self._runner.input_batch
        if holder is not None and holder.has_tracked_requests():
            if self._budgets is None:
                most = batch.max_num_reqs * (self._runner.num_spec_tokens + 1)
                self._budgets = ThinkingBudgets(self._runner.vllm_config.reasoning_config, most)
            self._budgets.force(processed, rows, batch.req_ids, self._runner.requests)
        return processed

    def _sample(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's token at each row [R], and the logits [R, V] that it was sampled from."""
        greedy = None if sampling.all_random else self.sampler.greedy_sample(logits)
        if sampling.all_greedy:
            return greedy, logits
        scaled, is_greedy, top_k, top_p = self._divided(metadata, logits, sampling)
        if self._in_turn is not None:
            sampled = self._in_turn.draw(
                scaled, metadata.num_draft_tokens, self._seeded_requests(sampling), top_k, top_p
            )
            self._in_turn.forget_all_but(self._runner.requests)
            scaled = apply_top_k_top_p(scaled, top_k, top_p)
            return sampled if greedy is None else torch.where(is_greedy, greedy, sampled), scaled
        scaled = apply_top_k_top_p(scaled, top_k, top_p)
        seeded, seeds = self._seeded(metadata.num_draft_tokens, sampling)
        if len(seeded) == len(scaled):
            sampled = torch.ops._C.fused_gumbel_argmax(scaled, torch.tensor(seeds))
        else:
            sampled = draw_tokens(scaled)
            if seeded:
                sampled[seeded] = torch.ops._C.fused_gumbel_argmax(
                    scaled[seeded], torch.tensor(seeds)
                )
        return sampled if greedy is None else torch.where(is_greedy, greedy, sampled), scaled

    def _divided(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
    ) -> list[Any]:
        """``logits`` [R, V] by each row's temperature, which rows are greedy [R], and each row's
        top-k and top-p."""
        temperature, top_k, top_p = self._by_row(metadata, sampling)
        is_greedy = temperature < GREEDY_BELOW
        if not sampling.all_random:
            temperature = temperature.masked_fill(is_greedy, 1.0)
        # In place where nobody is shown them: they are as large as the batch's vocabularies.
        divide = logits.div if _are_shown(sampling) else logits.div_
        return [divide(temperature[:, None]), is_greedy, top_k, top_p]

    @staticmethod
    def _by_row(metadata: SpecDecodeMetadata, sampling: SamplingMetadata) -> list[Any]:
        """Temperature, top-k and top-p of each row [R]; None for a setting that no request has."""
        settings = [sampling.temperature, sampling.top_k, sampling.top_p]
        if not metadata.max_spec_len:
            return settings
        counts = torch.tensor(metadata.num_draft_tokens) + 1
        rows = len(counts) + sum(metadata.num_draft_tokens)
        return [
            None if setting is None else setting.repeat_interleave(counts, output_size=rows)
            for setting in settings
        ]

    def _seeded(
        self, num_draft_tokens: Sequence[int], sampling: SamplingMetadata
    ) -> tuple[list[int], list[int]]:
        """The rows of requests with a seed, and what vLLM's sampler seeds each one's noise with, by
        the seed and the token's place."""
        rows: list[int] = []
        seeds: list[int] = []
        if not sampling.generators:
            return rows, seeds
        requests, first = self._seeded_requests(sampling), 0
        for row, drafts in enumerate(num_draft_tokens):
            if (request := requests.get(row)) is not None:
                rows += range(first, first + drafts + 1)
                places = range(request.place, request.place + drafts + 1)
                seeds += self._draws.at(request.request_id, request.seed, places)
            first += drafts + 1
        self._draws.forget_all_but(self._runner.requests)
        return rows, seeds

    def next_input(self, session: Any, num_computed_tokens: int) -> None:
        """A streaming session's next input comes: its output is cleared, and its generator goes
        on.

        Args:
            session: the runner's request, as it was with the input before.
            num_computed_tokens: of the session so far: all but its last output token.
        """
        generator, params = session.generator, session.sampling_params
        if generator is not None and params.temperature >= GREEDY_BELOW:
            drawn = num_computed_tokens + 1 - session.num_prompt_tokens
            self._earlier[generator] = self._earlier.get(generator, 0) + drawn

    def _seeded_requests(self, sampling: SamplingMetadata) -> dict[int, Seeded]:
        """By row of the batch, the requests with a seed."""
        requests, request_ids = self._runner.requests, self._runner.input_batch.req_ids
        return {
            row: Seeded(
                request_ids[row],
                generator.initial_seed(),
                self._earlier.get(generator, 0) + len(requests[request_ids[row]].output_token_ids),
            )
            for row, generator in sampling.generators.items()
        }


def _has_processors(sampling: SamplingMetadata) -> bool:
    """Whether a request of the batch changes its logits before they are ranked. vLLM refuses the
    other processors with a drafter."""
    holder = sampling.thinking_budget_state_holder
    return bool(
        not sampling.no_penalties
        or sampling.bad_words_token_ids
        or sampling.allowed_token_ids_mask is not None
        or any(
            isinstance(p, MinTokensLogitsProcessor) and p.min_toks
            for p in sampling.logitsprocs.non_argmax_invariant
        )
        or (holder is not None and holder.has_tracked_requests())
    )


def _are_shown(sampling: SamplingMetadata) -> bool:
    """Whether a request of the batch asks for log probabilities, of how many tokens or of which:
    then the raw logits are read after tokens were sampled."""
    return sampling.max_num_logprobs is not None or bool(sampling.logprob_token_ids)


def keep_accepted(
    sampled: Sequence[int], drafts: Sequence[int], counts: Sequence[int]
) -> list[list[int]]:
    """Each request's accepted drafts and the target's token after them, filled up with -1 to the
    longest draft plus one.

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
        kept.append(
            [*sampled[row : row + accepted + 1], *[PLACEHOLDER_TOKEN_ID] * (width - accepted - 1)]
        )
        row, at = row + count + 1, at + count
    return kept

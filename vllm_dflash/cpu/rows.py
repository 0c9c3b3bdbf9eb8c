"""Sampling settings by row of logits: each row as a request of its own, whose output ends with the
drafts before it.

vLLM's sampler then treats a row as plain decoding would treat it, whatever was drafted. Its own
rejection sampler has a second way through the settings for drafts, which counts committed tokens
only for ``min_tokens``, and forces the end of thinking in other rows.

    pytest tests/unit/test_rows.py tests/engine/test_thinking_budget.py
    pytest tests/engine/test_features.py
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class Rows:
    """The rows of a step's logits: for each request one a draft and one more."""

    def __init__(self, num_drafts: Sequence[int], draft_token_ids: Sequence[int]) -> None:
        """``num_drafts``: [B] of each request; ``draft_token_ids``: all of them, one request after
        the other."""
        self.first: list[int] = []
        """[B] each request's first row."""
        self.drafts: list[list[int]] = []
        """[B] each request's drafts."""
        self.owners: list[int] = []
        """[R] each row's request."""
        at = 0
        for request, count in enumerate(num_drafts):
            self.first.append(len(self.owners))
            self.drafts.append(list(draft_token_ids[at : at + count]))
            self.owners += [request] * (count + 1)
            at += count

    def of(self, request: int) -> range:
        """A request's rows."""
        return range(self.first[request], self.first[request] + len(self.drafts[request]) + 1)

    def outputs(self, request: int, output: Sequence[int]) -> list[list[int]]:
        """For each of a request's rows its ``output`` so far and the drafts before the row."""
        drafts = self.drafts[request]
        return [[*output, *drafts[:count]] for count in range(len(drafts) + 1)]


def each_row_alone(sampling: SamplingMetadata, rows: Rows) -> SamplingMetadata:
    """What ``Sampler.apply_logits_processors`` reads, by row in place of by request; thinking
    budgets are left out."""
    owners = torch.tensor(rows.owners)

    def spread(setting: torch.Tensor | None) -> torch.Tensor | None:
        return None if setting is None else setting[owners]

    outputs: list[list[int]] = []
    if not sampling.no_penalties or sampling.bad_words_token_ids:
        outputs = [
            output
            for i, out in enumerate(sampling.output_token_ids)
            for output in rows.outputs(i, out)
        ]
    penalties: dict[str, Any] = {}
    if not sampling.no_penalties:
        names = (
            "prompt_token_ids",
            "frequency_penalties",
            "presence_penalties",
            "repetition_penalties",
        )
        penalties = {name: spread(getattr(sampling, name)) for name in names}
    return replace(
        sampling,
        output_token_ids=outputs,
        spec_token_ids=None,
        allowed_token_ids_mask=spread(sampling.allowed_token_ids_mask),
        bad_words_token_ids={
            row: words for i, words in sampling.bad_words_token_ids.items() for row in rows.of(i)
        },
        logitsprocs=LogitsProcessors(
            min_tokens_by_row(p, rows) if isinstance(p, MinTokensLogitsProcessor) else p
            for p in sampling.logitsprocs.non_argmax_invariant
        ),
        thinking_budget_state_holder=None,
        **penalties,
    )


def without_processors(sampling: SamplingMetadata) -> SamplingMetadata:
    """The settings for logits that have been through ``Sampler.apply_logits_processors``
    already."""
    return replace(
        sampling,
        no_penalties=True,
        bad_words_token_ids={},
        allowed_token_ids_mask=None,
        logitsprocs=LogitsProcessors(),
        thinking_budget_state_holder=None,
    )


def min_tokens_by_row(processor: MinTokensLogitsProcessor, rows: Rows) -> MinTokensLogitsProcessor:
    """A processor for the rows whose output, drafts included, is shorter than its request's
    ``min_tokens``."""
    short = {
        row: (least, output, stop, structured)
        for request, (least, output, stop, structured) in processor.min_toks.items()
        for count, row in enumerate(rows.of(request))
        if len(output) + count < least
    }
    by_row = copy.copy(processor)
    by_row.min_toks = short
    by_row.logits_slice = _pairs(
        [(row, token) for row, (_, _, stop, _) in short.items() for token in stop]
    )
    by_row.restore_logits_slice = _pairs(
        [(row, t) for row, (_, _, stop, restored) in short.items() if restored for t in stop]
    )
    return by_row


def _pairs(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens, [n] int32 each."""
    rows, tokens = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2).unbind(1)
    return rows, tokens


class _States(ThinkingBudgetStateHolder):
    def set(self, states: dict[int, dict[str, Any]]) -> None:
        """In place of those that vLLM keeps from step to step."""
        self._state = states


class ThinkingBudgets:
    """Forces the end of thinking in the rows where plain decoding would.

    vLLM's rules for it are a state that goes on with each token of plain decoding. Here it goes on
    with each row: what it is after a draft counts if that draft is accepted. States are kept by
    request, also while a request waits after a preemption.
    """

    def __init__(self, reasoning_config: Any, max_num_rows: int) -> None:
        """``reasoning_config``: vLLM's; ``max_num_rows``: the most rows that a step's logits can
        have."""
        self._plain = _States(reasoning_config, max_num_rows, 0, torch.device("cpu"), False)
        self._known: dict[str, tuple[Any, dict[int, dict[str, Any]]]] = {}
        """By request its sampling parameters, and vLLM's state by the number of output tokens that
        it waits for."""

    def force(
        self,
        logits: torch.Tensor,
        rows: Rows,
        request_ids: Sequence[str],
        requests: Mapping[str, Any],
    ) -> None:
        """Changes ``logits`` [R, V] in place; ``requests`` are the runner's, by id, those of the
        batch in the order of ``rows``."""
        by_row: dict[int, dict[str, Any]] = {}
        for i, request_id in enumerate(request_ids):
            request = requests[request_id]
            if (
                request.sampling_params is None
                or request.sampling_params.thinking_token_budget is None
            ):
                continue
            states = self._states(request_id, request)
            length = len(request.output_token_ids)
            for count, (row, output) in enumerate(
                zip(rows.of(i), rows.outputs(i, request.output_token_ids), strict=True)
            ):
                by_row[row] = states[length + count + 1] = self._after(
                    states[length + count], output
                )
        self._plain.set(by_row)
        self._plain.apply_to_logits(logits, False, None)
        for request_id in [known for known in self._known if known not in requests]:
            del self._known[request_id]

    def _states(self, request_id: str, request: Any) -> dict[int, dict[str, Any]]:
        """What is known of a request, with the state that its next token needs and none of drafts
        that were rejected."""
        params, states = self._known.get(request_id, (None, {}))
        length = len(request.output_token_ids)
        if (
            params is not request.sampling_params or length not in states
        ):  # new, or goes on with more input
            states = {
                0: self._plain._init_state_entry(
                    request.prompt_token_ids, request.sampling_params.thinking_token_budget
                )
            }
            for count in range(length):
                states[count + 1] = self._after(states[count], request.output_token_ids[:count])
        states = {length: states[length]}
        self._known[request_id] = request.sampling_params, states
        return states

    def _after(self, state: dict[str, Any], output: list[int]) -> dict[str, Any]:
        """The state once vLLM has been told of ``output``; the given one stays as it is."""
        self._plain.set({0: dict(state)})
        self._plain.update_state([output], None)
        return self._plain._state[0]

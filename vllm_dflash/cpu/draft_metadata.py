"""Which rows of a step verify drafts, on vLLM's V1 runner on a CPU: by numpy, where vLLM's own
takes a dozen tensor operators that were made for a GPU.

pytest tests/unit/test_verification.py
"""

import numpy as np
import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class DraftMetadata:
    """In place of a runner's ``_calc_spec_decode_metadata`` on a CPU: the same without a tensor
    operator."""

    def __init__(self, input_ids: np.ndarray, max_num_reqs: int) -> None:
        """``input_ids``: the runner's buffer of the step's tokens."""
        self._input_ids = input_ids
        self._order, self._zeros = (
            torch.arange(max_num_reqs + 1, dtype=torch.int32),
            torch.zeros(max_num_reqs, dtype=torch.int32),
        )
        self._decoding: dict[int, SpecDecodeMetadata] = {}

    def __call__(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
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
        rows = np.arange(ends[-1], dtype=np.int32) + np.repeat(
            cu_num_scheduled_tokens - ends, num_sampled
        )
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

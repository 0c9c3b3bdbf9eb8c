"""Which rows of a step verify drafts, on vLLM's V1 runner on a CPU: by numpy, where vLLM's own
takes a dozen tensor operators that were made for a GPU.

pytest tests/unit/test_verification.py
"""

from functools import lru_cache
from typing import NamedTuple

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
        ends = (num_draft_tokens + 1).cumsum(dtype=np.int32)
        if ends.tobytes() == cu_num_scheduled_tokens.tobytes():
            indices = _of_decodes(num_draft_tokens.tobytes())
        else:
            indices = _indices(num_draft_tokens, ends, cu_num_scheduled_tokens)
        return SpecDecodeMetadata(
            draft_token_ids=torch.from_numpy(self._input_ids[indices.drafts]),
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=indices.cu_num_draft_tokens,
            cu_num_sampled_tokens=indices.ends,
            target_logits_indices=indices.target,
            bonus_logits_indices=indices.bonus,
            logits_indices=indices.rows,
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


class _Indices(NamedTuple):
    """What ``SpecDecodeMetadata`` says of a step's rows, [n] int32 each; ``drafts`` [n] are the
    drafts' places in the step's tokens."""

    drafts: np.ndarray
    cu_num_draft_tokens: torch.Tensor
    ends: torch.Tensor
    target: torch.Tensor
    bonus: torch.Tensor
    rows: torch.Tensor


@lru_cache(maxsize=1024)
def _of_decodes(num_draft_tokens: bytes) -> _Indices:
    """Where all requests decode, so that every row of the step verifies: the same in each such
    step. Nobody writes to it."""
    drafts = np.frombuffer(num_draft_tokens, dtype=np.int32)
    ends = (drafts + 1).cumsum(dtype=np.int32)
    # Made outside of inference mode, as it may be used there and elsewhere.
    with torch.inference_mode(False):
        return _indices(drafts, ends, ends)


def _indices(
    num_draft_tokens: np.ndarray, ends: np.ndarray, cu_num_scheduled_tokens: np.ndarray
) -> _Indices:
    """By request [B] int32, its drafts, the end of its rows among those that verify, and that of
    its rows in the step's."""
    rows = np.arange(ends[-1], dtype=np.int32) + np.repeat(
        cu_num_scheduled_tokens - ends, num_draft_tokens + 1
    )
    is_draft = np.ones(len(rows), dtype=bool)
    is_draft[ends - 1] = False
    target = is_draft.nonzero()[0].astype(np.int32)
    return _Indices(
        rows[target] + 1,
        *map(
            torch.from_numpy,
            (num_draft_tokens.cumsum(dtype=np.int32), ends, target, ends - 1, rows),
        ),
    )

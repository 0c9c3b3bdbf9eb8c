"""Speculation changes no greedy output: in float32 token for token, in bfloat16 but for logits that
rounding cannot tell apart."""

import pytest

from engine.harness import Batch

pytestmark = pytest.mark.engine
ROUNDING = 0.07
"""Largest gap, in nats, between the two best log-probabilities that bfloat16 rounding can turn
over: logits here reach about 16, where neighbouring bfloat16 numbers are 1/16 apart."""


def test_float32(plain_float32: list[Batch], dflash_float32: list[Batch]) -> None:
    """64 prompts x 128 tokens, in batches of 1, 4 and 16."""
    for plain, ours in zip(plain_float32, dflash_float32, strict=True):
        assert len(plain.tokens) == 64
        assert all(len(t) == 128 for t in plain.tokens)
        assert ours.tokens == plain.tokens


def test_bfloat16(plain_bfloat16: Batch, dflash_bfloat16: Batch) -> None:
    """Where the outputs part, plain decoding's two best log-probabilities are closer than bfloat16
    can tell apart."""
    gaps = []
    for i, (plain, ours) in enumerate(
        zip(plain_bfloat16.tokens, dflash_bfloat16.tokens, strict=True)
    ):
        if plain != ours:
            at = next(k for k, (a, b) in enumerate(zip(plain, ours, strict=True)) if a != b)
            best, second = plain_bfloat16.report["logprobs"][i][at]
            gaps.append(best - second)
    print(
        f"bfloat16: {64 - len(gaps)} of 64 outputs equal; gaps in nats at the first difference:"
        f" {sorted(gaps)}"
    )
    assert all(gap <= ROUNDING for gap in gaps), sorted(gaps)

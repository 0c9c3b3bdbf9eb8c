"""What differs between the supported vLLM versions: each fact by the text of a source that has it
and of one that has not."""

import ast
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash import compat
from vllm_dflash.metrics import drafter as metrics
from vllm_dflash.upstream import Definition

COUNTS_SLOTS = """
def max_num_new_slots_for_drafting(self):
    if self.use_dflash():
        return self.num_speculative_tokens
    return 0
"""
COUNTS_NONE = """
def max_num_new_slots_for_drafting(self):
    if self.use_dflash() or self.use_dspark():
        return 0
    return self.num_speculative_tokens
"""
DRAFTS_ALWAYS = "def propose(self, num_speculative_tokens=None):\n    return self.draft_tokens\n"
SKIPS = """
def propose(self, num_speculative_tokens=None):
    if num_speculative_tokens == 0:
        self.store()
        return self.draft_tokens
    return self.run()
"""


class Drafter:
    pass


def source(text: str) -> Any:
    return SimpleNamespace(locate=lambda name: Definition("module", name, ast.parse(text).body[0]))


def test_draft_slots_are_needed_where_a_step_counts_them() -> None:
    assert compat.draft_slots_needed(source(COUNTS_SLOTS))
    assert not compat.draft_slots_needed(source(COUNTS_NONE))


def test_k_of_a_step() -> None:
    """0.32's scheduler output has no ``skip_drafts``; where 0.33's has it set, K says what would
    have been drafted."""
    assert compat.num_drafted(SimpleNamespace(num_spec_tokens_to_schedule=7)) == 7
    assert (
        compat.num_drafted(SimpleNamespace(num_spec_tokens_to_schedule=7, skip_drafts=False)) == 7
    )
    assert compat.num_drafted(SimpleNamespace(num_spec_tokens_to_schedule=7, skip_drafts=True)) == 0


@pytest.mark.parametrize(("text", "drafted"), [(DRAFTS_ALWAYS, 7), (SKIPS, 0)])
def test_drafts_of_a_step_with_k_0_count_only_where_they_were_made(
    text: str, drafted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.33's V2 speculator returns the last step's tokens where it drafts none: they were counted
    once more."""
    monkeypatch.setattr(compat, "Sources", lambda: source(text))
    compat.v2_skips_drafts.cache_clear()
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1, data_parallel_index=0),
        speculative_config=SimpleNamespace(num_speculative_tokens=7),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    try:
        record = metrics.DrafterRecord(Drafter(), config, on_gpu=False)
        record.watch(lambda num_speculative_tokens: [[0] * 7])(num_speculative_tokens=0)
        assert sum(count for _, count in record.samples()["drafted_tokens"]) == drafted
        record.recorder.close()
    finally:
        compat.v2_skips_drafts.cache_clear()

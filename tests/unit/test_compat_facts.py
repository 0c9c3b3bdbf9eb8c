"""What differs between the supported vLLM versions: each fact by the text of a source that has it
and of one that has not."""

import ast
from types import SimpleNamespace
from typing import Any

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


def test_a_step_with_k_0_counts_no_drafts() -> None:
    """The V2 speculator returns the last step's tokens where it drafts none: they were counted once
    more, on vLLM 0.32."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1, data_parallel_index=0),
        speculative_config=SimpleNamespace(num_speculative_tokens=7),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    record = metrics.DrafterRecord(Drafter(), config, on_gpu=False)
    propose = record.watch(lambda num_speculative_tokens: [[0] * 7])
    for k, drafted in ((0, 0), (7, 7), (0, 7)):
        propose(num_speculative_tokens=k)
        assert sum(count for _, count in record.samples()["drafted_tokens"]) == drafted
    record.recorder.close()

"""What differs between the vLLM versions that are supported: named facts, decided by what the
source has, not by a number.

Imports nothing of vLLM. Code that has to know asks here and nowhere else, so that a version that
goes takes its facts along.

    pytest tests/unit/test_compat_facts.py
"""

import ast
from typing import Any

from vllm_dflash.upstream import Sources

_SLOTS = "vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting"


def draft_slots_needed(sources: Sources) -> bool:
    """Whether a step's budget of tokens counts a dflash drafter's queries: 0.32's does, 0.33 drafts
    in a pass of its own."""
    tests = (
        n
        for n in ast.walk(sources.locate(_SLOTS).node)
        if isinstance(n, ast.If) and "use_dflash" in ast.dump(n.test)
    )
    returned = [n.value for test in tests for n in test.body if isinstance(n, ast.Return)]
    return not any(isinstance(value, ast.Constant) and value.value == 0 for value in returned)


def num_drafted(scheduled: Any) -> int:
    """K of a step, by its ``SchedulerOutput``; 0 where 0.33's scheduler says that nobody can use
    its drafts (``skip_drafts``)."""
    return 0 if getattr(scheduled, "skip_drafts", False) else scheduled.num_spec_tokens_to_schedule

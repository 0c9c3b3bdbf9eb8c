"""Speculative config: room in a step's buffers for a drafter's whole block, also where fewer of its
tokens are verified."""

from functools import wraps
from typing import Any

from vllm_dflash.patches.guard import drafts_ours

from vllm_dflash.compat import draft_slots_needed
from vllm_dflash.patch import Patch
from vllm_dflash.upstream import Sources

_KNOWN = "_vllm_dflash_slots"
"""Where a config keeps the answer: the scheduler asks in each step."""


def _replace(original: Any) -> property:
    @wraps(original.fget)
    def max_num_new_slots_for_drafting(self: Any) -> int:
        known: int | None = self.__dict__.get(_KNOWN)
        if known is not None:
            return known
        if drafts_ours(self, ""):
            self.__dict__[_KNOWN] = (
                self.draft_model_config.hf_config.block_size - 1
            )  # the anchor has its slot already
            return self.__dict__[_KNOWN]
        return original.fget(self)

    return property(max_num_new_slots_for_drafting)


def _unneeded(sources: Sources) -> str | None:
    return (
        None
        if draft_slots_needed(sources)
        else "this vLLM drafts in a pass of its own, and counts no drafted position in a step"
    )


PATCH = Patch(
    target="vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting",
    fingerprints={
        "vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting": {
            "0.32": "713fb3db4e209569"
        }
    },
    why=(
        "vLLM's buffers hold num_speculative_tokens + 1 drafted positions a request; ours drafts"
        " whole blocks (draft_lookahead.py), and no hook is asked"
    ),
    until="vLLM 0.32 is dropped",
    replace=_replace,
    unneeded=_unneeded,
)

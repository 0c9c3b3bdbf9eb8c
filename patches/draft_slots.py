"""Speculative config: room in a step's buffers for a drafter's whole block, also where fewer of its tokens are verified."""

from functools import wraps
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: Any) -> property:
    @wraps(original.fget)
    def max_num_new_slots_for_drafting(self: Any) -> int:
        if self.method == "dflash" and is_ours(self.draft_model_config.architectures):
            return self.draft_model_config.hf_config.block_size - 1  # the anchor has its slot already
        return original.fget(self)

    return property(max_num_new_slots_for_drafting)


PATCH = Patch(
    target="vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting",
    versions=SUPPORTED_VLLM,
    fingerprints={"vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting": "35c89495f277993d"},
    why=(
        "vLLM's buffers hold num_speculative_tokens + 1 drafted positions a request; ours drafts whole blocks (draft_lookahead.py), "
        "and no hook is asked"
    ),
    until="vLLM asks the drafter how many positions it drafts",
    replace=_replace,
)

"""Engine configuration: cache slots for a drafter's whole block, also where fewer of its tokens are
verified."""

from functools import wraps
from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patch import Patch


def _replace(original: Any) -> property:
    @wraps(original.fget)
    def num_lookahead_tokens(self: Any) -> int:
        speculative = self.speculative_config
        if is_ours(speculative):
            return speculative.draft_model_config.hf_config.block_size
        return original.fget(self)

    return property(num_lookahead_tokens)


PATCH = Patch(
    target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
    fingerprints={"vllm.config.vllm:VllmConfig.num_lookahead_tokens": "dadea65e5151a144"},
    why=(
        "vLLM drafts num_speculative_tokens + 1 positions; a drafter that has only seen whole"
        " blocks accepts next to nothing in a shorter one (docs/log.md), so all of its block is"
        " drafted, and needs cache slots; no hook is asked how many"
    ),
    until="vLLM asks the drafter how many positions it writes",
    replace=_replace,
)

"""Engine configuration: cache slots for a drafter's whole block, also where fewer of its tokens are
verified."""

from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch


def _num_lookahead_tokens(original: Any, config: Any) -> int:
    return config.speculative_config.draft_model_config.hf_config.block_size


PATCH = Patch(
    target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
    fingerprints={"vllm.config.vllm:VllmConfig.num_lookahead_tokens": "aa2b957bb1d90c81"},
    why=(
        "vLLM drafts num_speculative_tokens + 1 positions; a drafter that has only seen whole"
        " blocks accepts next to nothing in a shorter one (docs/log.md), so all of its block is"
        " drafted, and needs cache slots; no hook is asked how many"
    ),
    until="vLLM asks the drafter how many positions it writes",
    replace=instead(_num_lookahead_tokens, "speculative_config"),
)

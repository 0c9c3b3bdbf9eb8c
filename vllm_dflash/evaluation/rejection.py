"""An engine whose drafts are all rejected: what a step costs that drafts and verifies, with the one
token that it commits anyway.

On a CPU our proposer hands out tokens by chance, so that drafter and verification do all their
work; elsewhere vLLM's synthetic acceptance rejects.

    pytest tests/engine/test_bench.py
"""

from collections.abc import Mapping
from typing import Any

_CONFIG = "speculative_config"


def rejecting(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an ``LLM`` of ours, for ``reject_drafts``."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return dict(engine_args)
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 1.0}
    return {**engine_args, _CONFIG: {**engine_args[_CONFIG], **synthetic}}


def reject_drafts(llm: Any) -> None:
    """Has a started engine reject its drafts, where its arguments do not.

    Raises:
        RuntimeError: the drafter is not ours, or not in this process.
    """
    from vllm.platforms import current_platform

    from vllm_dflash.drafting.v1 import DFlashProposer

    if not current_platform.is_cpu():
        return
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    drafter = getattr(getattr(worker, "model_runner", None), "drafter", None)
    if not isinstance(drafter, DFlashProposer):
        raise RuntimeError(
            "--break-even needs the drafter in the engine's process: leave tensor_parallel_size out"
            " of --engine-args"
        )
    drafter.draft_by_chance()

"""What is replaced in vLLM, one file per seam, each with its ``PATCH``; README.md has the table.

vllm-dflash status          what is applied
pytest tests/patches        each against the installed vLLM
"""

from vllm_dflash.patches import (
    draft_lookahead,
    draft_slots,
    request_params,
    scheduler_metrics,
    server_metrics,
    speculative_config,
    streaming_sessions,
    v1_cpu_expand,
    v1_cpu_seeds,
    v1_draft_fit,
    v1_no_drafts,
    v1_proposer,
    v2_speculator,
    vllm_config,
)

ALL = (
    speculative_config.PATCH,
    vllm_config.PATCH,
    draft_lookahead.PATCH,
    draft_slots.PATCH,
    v1_proposer.PATCH,
    v1_draft_fit.PATCH,
    v1_no_drafts.PATCH,
    v1_cpu_seeds.PATCH,
    v1_cpu_expand.PATCH,
    v2_speculator.PATCH,
    request_params.PATCH,
    streaming_sessions.PATCH,
    scheduler_metrics.PATCH,
    server_metrics.PATCH,
)

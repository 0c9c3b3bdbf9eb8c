"""What is replaced in vLLM, one file for each place, with its record or records; README.md has the
table.

vllm-dflash status          what is applied
pytest tests/patches        each against the installed vLLM

``place.py`` and ``on_import.py`` set and put back attributes, for ``vllm_dflash/patching.py``.
"""

from vllm_dflash.patches import (
    adaptive_scheduler,
    cpu_layers,
    cpu_target,
    draft_lookahead,
    draft_model,
    draft_slots,
    hidden_states,
    request_drafts,
    request_params,
    scheduler_init,
    scheduler_steps,
    server_metrics,
    speculative_config,
    streaming_sessions,
    v1_confidences,
    v1_cost_profile,
    v1_cpu_expand,
    v1_cpu_seeds,
    v1_draft_fit,
    v1_draft_metadata,
    v1_no_drafts,
    v1_prompt_embeds,
    v1_proposer,
    v1_session_seeds,
    v1_steps_without_drafts,
    v1_verifier,
    v2_cost_profile,
    v2_speculator,
    vllm_config,
    worker_calls,
)

ALL = (
    *speculative_config.PATCHES,
    *vllm_config.PATCHES,
    adaptive_scheduler.PATCH,
    draft_lookahead.PATCH,
    draft_slots.PATCH,
    draft_model.PATCH,
    v1_proposer.PATCH,
    v1_draft_fit.PATCH,
    v1_no_drafts.PATCH,
    v1_cpu_seeds.PATCH,
    v1_session_seeds.PATCH,
    v1_prompt_embeds.PATCH,
    v1_cpu_expand.PATCH,
    v1_verifier.PATCH,
    v1_draft_metadata.PATCH,
    v1_steps_without_drafts.PATCH,
    v1_confidences.PATCH,
    v1_cost_profile.PATCH,
    *cpu_layers.PATCHES,
    *cpu_target.PATCHES,
    worker_calls.PATCH,
    v2_speculator.PATCH,
    *v2_cost_profile.PATCHES,
    request_params.PATCH,
    *request_drafts.PATCHES,
    streaming_sessions.PATCH,
    scheduler_init.PATCH,
    *scheduler_steps.PATCHES,
    server_metrics.PATCH,
    hidden_states.PATCH,
)

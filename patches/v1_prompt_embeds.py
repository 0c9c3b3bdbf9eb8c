"""V1 runner: a prompt that is embeddings throughout finds no placeholder for a draft in its row."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_OUTPUT = "vllm.v1.core.sched.output"
_STATE = "vllm.v1.worker.gpu_input_batch:CachedRequestState"


def _update_states(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    if self.enable_prompt_embeds:
        batch, cached = self.input_batch, scheduler_output.scheduled_cached_reqs
        entering = [
            request
            for request in (
                *scheduler_output.scheduled_new_reqs,
                *(
                    self.requests[name]
                    for name in cached.req_ids
                    if name in cached.resumed_req_ids or name not in batch.req_id_to_index
                ),
            )
            if request.prompt_token_ids is None and request.prompt_embeds is not None
        ]
        if entering:
            longest = max(len(request.prompt_embeds) for request in entering)
            # Which row each will have is not known yet. What other rows have below 0 is either
            # nobody's any more, or written anew for this step.
            rows = batch.token_ids_cpu[:, :longest]
            rows[rows < 0] = 0
    return original(self, scheduler_output)


PATCH = Patch(
    target=f"{_RUNNER}._update_states",
    signatures={f"{_RUNNER}._update_states": "self, scheduler_output"},
    names=(
        f"{_RUNNER}.speculative_config",
        f"{_RUNNER}.enable_prompt_embeds",
        f"{_RUNNER}.input_batch",
        f"{_RUNNER}.requests",
        "vllm.v1.worker.gpu_input_batch:InputBatch.token_ids_cpu",
        "vllm.v1.worker.gpu_input_batch:InputBatch.req_id_to_index",
        f"{_STATE}.prompt_token_ids",
        f"{_STATE}.prompt_embeds",
        f"{_OUTPUT}:SchedulerOutput.scheduled_new_reqs",
        f"{_OUTPUT}:SchedulerOutput.scheduled_cached_reqs",
        f"{_OUTPUT}:NewRequestData.prompt_token_ids",
        f"{_OUTPUT}:NewRequestData.prompt_embeds",
        f"{_OUTPUT}:CachedRequestData.req_ids",
        f"{_OUTPUT}:CachedRequestData.resumed_req_ids",
    ),
    why=(
        "penalties read a prompt's tokens from its row, and of embeddings throughout there are"
        " none: they read what the row had before, and -1, which the scheduler puts where it pads a"
        " request with drafts, ends the engine (with vLLM's n-gram too); no hook is asked between"
        " the scheduler and that"
    ),
    until="vLLM fills the row of such a prompt",
    replace=instead(_update_states, "speculative_config"),
)

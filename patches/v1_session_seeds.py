"""V1 runner on a CPU: a streaming-input session with a seed goes on with the random numbers where
they were."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_STATE = "vllm.v1.worker.gpu_input_batch:CachedRequestState"


def _update_streaming_request(
    original: Callable[..., Any], self: Any, req_id: str, new_req_data: Any
) -> Any:
    # Before vLLM clears the output: how much of it there was is not told later, and the runner's
    # own may end with accepted drafts that the scheduler has dropped.
    self.drafter.backend.next_input(self.requests[req_id], new_req_data.num_computed_tokens)
    return original(self, req_id, new_req_data)


PATCH = Patch(
    target=f"{_RUNNER}._update_streaming_request",
    # That the body clears the output, and puts what was kept of it into the prompt.
    fingerprints={f"{_RUNNER}._update_streaming_request": "91d6d3b0b184b376"},
    names=(
        f"{_RUNNER}.speculative_config",
        f"{_RUNNER}.drafter",
        f"{_RUNNER}.requests",
        "vllm.v1.core.sched.output:NewRequestData.num_computed_tokens",
        f"{_STATE}.generator",
        f"{_STATE}.num_prompt_tokens",
        f"{_STATE}.output_token_ids",
        f"{_STATE}.sampling_params",
    ),
    why=(
        "a session keeps its generator from input to input, and its output is cleared with each:"
        " our draws, which go by an output token's place, began anew, and the text was another"
        " than without drafts; no hook is asked"
    ),
    until="the runner keeps how many tokens a session has sampled",
    replace=instead(_update_streaming_request, "speculative_config"),
)

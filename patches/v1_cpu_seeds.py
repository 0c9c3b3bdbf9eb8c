"""V1 runner on a CPU: a request with a seed survives a prompt that is prefilled in chunks, and
samples what it would otherwise."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def _sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **keywords: Any) -> Any:
    generators = self.input_batch.generators
    if not generators or self.device.type != "cpu":
        return original(self, *args, **keywords)
    discarded = self.discard_request_mask.np
    # The runner samples a token for these too, and throws it away: without their generators
    # nothing has to be taken back.
    withheld = {row: generators.pop(row) for row in list(generators) if discarded[row]}
    try:
        return original(self, *args, **keywords)
    finally:
        generators.update(withheld)


PATCH = Patch(
    target=f"{_RUNNER}.sample_tokens",
    signatures={f"{_RUNNER}.sample_tokens": "self, grammar_output"},
    names=(
        f"{_RUNNER}.speculative_config",
        f"{_RUNNER}.input_batch",
        f"{_RUNNER}.device",
        f"{_RUNNER}.discard_request_mask",
        "vllm.v1.worker.gpu_input_batch:InputBatch.generators",
    ),
    why=(
        "the runner takes back a discarded token's random numbers by moving its generator's offset,"
        " which a CPU generator does not have: a seed and a prompt in chunks end the engine; no"
        " hook is asked between the draw and that"
    ),
    until="vLLM draws nothing for a request whose token it discards",
    replace=instead(_sample_tokens, "speculative_config"),
)

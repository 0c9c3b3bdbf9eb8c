"""V1 runner on a CPU: a request with a seed survives a prompt that is prefilled in chunks, and
samples what it would otherwise."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def sample_tokens(self: Any, *arguments: Any, **keywords: Any) -> Any:
        from vllm_dflash.drafting.v1 import DFlashProposer

        if not isinstance(getattr(self, "drafter", None), DFlashProposer):
            return original(self, *arguments, **keywords)
        generators = self.input_batch.generators
        if not generators or self.device.type != "cpu":
            return original(self, *arguments, **keywords)
        discarded = self.discard_request_mask.np
        # The runner samples a token for these too, and throws it away: without their generators
        # nothing has to be taken back.
        withheld = {row: generators.pop(row) for row in list(generators) if discarded[row]}
        try:
            return original(self, *arguments, **keywords)
        finally:
            generators.update(withheld)

    return sample_tokens


PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    signatures={
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self, grammar_output"
    },
    why=(
        "the runner takes back a discarded token's random numbers by moving its generator's offset,"
        " which a CPU generator does not have: a seed and a prompt in chunks end the engine; no"
        " hook is asked between the draw and that"
    ),
    until="vLLM draws nothing for a request whose token it discards",
    replace=_replace,
)

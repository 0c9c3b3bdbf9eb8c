"""Requests: settings that vLLM's V1 runner gets wrong beside drafts on a GPU are refused, and a
malformed limit of drafts, with what to do."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches import request_drafts, scheduler_init
from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch
from vllm_dflash.request_limits import RequestError, most_drafts

WRONG_ON_A_V1_GPU = ("thinking_token_budget", "logprob_token_ids")
"""Fields of ``SamplingParams``. The budget is overshot and ends neighbours' thinking (vLLM issue
39573); log probabilities are lost."""


def _validate_params(
    original: Callable[..., Any], self: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    wrong = [name for name in WRONG_ON_A_V1_GPU if getattr(params, name, None) is not None]
    if wrong and _verifies_by_vllm(self.vllm_config):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"{' and '.join(wrong)}: vLLM's V1 model runner does not keep to this beside a"
            " drafter on a GPU. Start the server with VLLM_USE_V2_MODEL_RUNNER=1, or without a"
            " drafter, or leave the field out",
            parameter=wrong[0],
        )
    _check_limit(getattr(params, "extra_args", None), self.vllm_config)
    return original(self, params, *args, **kwargs)


def _check_limit(extra_args: Any, config: Any) -> None:
    """Raises VLLMValidationError where a request's limit of drafts is malformed, or nobody would
    keep to it: here, and not in the engine, which such an error would end."""
    if not extra_args:
        return
    from vllm.exceptions import VLLMValidationError

    from vllm_dflash.plugin import patch_set

    try:
        most = most_drafts(extra_args, config.speculative_config.num_speculative_tokens)
        if most is not None and not all(
            patch_set().fits(patch) for patch in (scheduler_init.PATCH, *request_drafts.PATCHES)
        ):
            raise RequestError(
                "this vLLM's scheduler is not one that keeps to a request's limit of drafts"
                " (`vllm-dflash status` says why): leave dflash out"
            )
    except RequestError as error:
        raise VLLMValidationError(
            f"extra_args (over HTTP vllm_xargs): {error}", parameter="extra_args"
        ) from None


def _verifies_by_vllm(config: Any) -> bool:
    """Whether drafts of ours are verified by vLLM's V1 rejection sampler; on a CPU they are by
    ours, on V2 by one that counts drafts."""
    from vllm.platforms import current_platform

    return not config.use_v2_model_runner and not current_platform.is_cpu()


PATCH = Patch(
    target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
    signatures={
        "vllm.v1.engine.input_processor:InputProcessor._validate_params": "self, params, ..."
    },
    names=(
        *(f"vllm.sampling_params:SamplingParams.{name}" for name in WRONG_ON_A_V1_GPU),
        "vllm.sampling_params:SamplingParams.extra_args",
        "vllm.v1.engine.input_processor:InputProcessor.vllm_config",
        "vllm.config.vllm:VllmConfig.use_v2_model_runner",
    ),
    why=(
        "vLLM's V1 rejection sampler forces the end of thinking in other rows than plain decoding"
        " does, a neighbour's among them, and drops logprob_token_ids, both in silence; the hook"
        " for refusals, a logits processor's validate_params, is not asked beside a"
        " drafter. A malformed limit of drafts is refused at the same place"
    ),
    until=(
        "vLLM's issue 39573 is closed, and its V1 rejection sampler returns logprob_token_ids; or"
        " the V1 runner is gone"
    ),
    replace=instead(_validate_params),
)

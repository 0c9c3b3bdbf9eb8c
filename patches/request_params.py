"""Requests: settings that vLLM's runners get wrong beside drafts on a GPU are refused, and a
malformed limit of drafts, with what to do."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches import request_drafts, scheduler_init
from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch
from vllm_dflash.request_limits import RequestError, said_of

WRONG_ON_V2 = ("logprob_token_ids",)
WRONG_ON_V1 = ("thinking_token_budget", *WRONG_ON_V2)
"""Fields of ``SamplingParams``. The budget is overshot and ends neighbours' thinking (vLLM issue
39573); log probabilities are lost, with both runners."""


def _validate_params(
    original: Callable[..., Any], self: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    names = _wrong_beside_drafts(self.vllm_config)
    wrong = [name for name in names if getattr(params, name, None) is not None]
    if wrong:
        from vllm.exceptions import VLLMValidationError

        v2 = "" if set(wrong) & set(WRONG_ON_V2) else "with VLLM_USE_V2_MODEL_RUNNER=1, or "
        raise VLLMValidationError(
            f"{' and '.join(wrong)}: vLLM's model runner does not keep to this beside a drafter on"
            f" a GPU. Start the server {v2}without a drafter, or leave the field out",
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
        most = said_of(extra_args, config.speculative_config.num_speculative_tokens).most
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


def _wrong_beside_drafts(config: Any) -> tuple[str, ...]:
    """The fields that are wrong with drafts of ours. On a CPU with the V1 runner none is, as we
    verify there; V2's rejection sampler counts drafts, and is not told of chosen token ids."""
    from vllm.platforms import current_platform

    if config.use_v2_model_runner:
        return WRONG_ON_V2
    return () if current_platform.is_cpu() else WRONG_ON_V1


PATCH = Patch(
    target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
    signatures={
        "vllm.v1.engine.input_processor:InputProcessor._validate_params": "self, params, ..."
    },
    names=(
        *(f"vllm.sampling_params:SamplingParams.{name}" for name in WRONG_ON_V1),
        "vllm.sampling_params:SamplingParams.extra_args",
        "vllm.v1.engine.input_processor:InputProcessor.vllm_config",
        "vllm.config.vllm:VllmConfig.use_v2_model_runner",
    ),
    why=(
        "vLLM's V1 rejection sampler forces the end of thinking in other rows than plain decoding"
        " does, a neighbour's among them, and its V1 and V2 ones drop logprob_token_ids, in"
        " silence; the hook for refusals, a logits processor's validate_params, is not asked"
        " beside a drafter. A malformed limit of drafts is refused at the same place"
    ),
    until="vLLM's issue 39573 is closed, and its rejection samplers return logprob_token_ids",
    replace=instead(_validate_params),
)

"""Speculative config: a drafter that does not fit its target is refused before any process starts;
a whole block is the default."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patches.guard import drafts_ours

from vllm_dflash.formats import METHOD, kind_named
from vllm_dflash.patch import Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def post_init(self: Any, *arguments: Any) -> Any:
        model = self.model
        if model is not None and self.method != METHOD:
            from vllm_dflash.checks import method_of

            self.method = method_of(model, self.revision, self.method)
        if self.method == METHOD and model is not None:
            from vllm_dflash.checks import read_early

            drafter = read_early(model, self.revision, self.num_speculative_tokens)
            if drafter is not None and self.num_speculative_tokens is None:
                self.num_speculative_tokens = drafter.max_speculative_tokens
        result = original(self, *arguments)
        if self.method == _WHOLE_MODEL:  # vLLM may have fetched what was not at hand before
            kind = kind_named({"architectures": self.draft_model_config.architectures})
            if kind is not None:
                from vllm_dflash.checks import check_method

                check_method(kind, self.method, model)
        if drafts_ours(self, ""):
            from vllm_dflash.checks import check_speculative_config

            draft = self.draft_model_config
            served = draft.architectures
            for name, value in check_speculative_config(self).items():
                setattr(draft.hf_config, name, value)
            if draft.hf_config.architectures != served:
                self.update_arch_()
            from vllm_dflash.plugin import patch_set

            if patch_set().fits(WHOLE_HITS):
                self.disable_eagle_block_drop = True
        return result

    return post_init


_CONFIG = "vllm.config.speculative:SpeculativeConfig"
_WHOLE_MODEL = "draft_model"
"""The method that vLLM takes where it recognises no other."""

PATCH = Patch(
    # Not _verify_args: pydantic takes that one into its schema when the class is made, and
    # __post_init__ is looked up at each call.
    target="vllm.config.speculative:SpeculativeConfig.__post_init__",
    signatures={f"{_CONFIG}.__post_init__": "self", f"{_CONFIG}.update_arch_": "self"},
    names=(
        # By these vLLM learns to read the speculators format of our kinds (``plugin.py``).
        "vllm.transformers_utils.configs.speculators.algos:SUPPORTED_SPECULATORS_TYPES",
        "vllm.transformers_utils.configs.speculators.algos:register_speculator",
        "vllm.transformers_utils.configs.speculators.algos:update_dflash",
        *(
            f"{_CONFIG}.{name}"
            for name in (
                "method",
                "model",
                "revision",
                "num_speculative_tokens",
                "draft_model_config",
                "draft_sample_method",
                "enable_adaptive_verification",
                "target_model_config",
                "target_parallel_config",
                "use_local_argmax_reduction",
            )
        ),
    ),
    why=(
        "vLLM checks no drafter against its target: most mismatches would only show as low"
        " acceptance; no hook sees the config in the front end. Where no method is said, it knows a"
        " dflash drafter by its path alone. What vLLM's own code reads of the"
        " draft config is written into it, as formats spell it in different ways"
    ),
    until="vLLM calls the draft model class's own check of its config",
    replace=_replace,
)
WHOLE_HITS = Patch(
    target=f"{_CONFIG}.use_eagle_block_drop",
    scope="ours",
    needs="optional",
    names=(f"{_CONFIG}.disable_eagle_block_drop",),
    looked_up={f"{_CONFIG}.use_eagle_block_drop": ("disable_eagle_block_drop",)},
    why=(
        "EAGLE's K/V of a position depend on the token after it, so vLLM takes back the last page"
        " of every prefix-cache hit. Ours depend on the target's hidden state there alone:"
        " hits are as long as without speculation. vLLM has a setting for it, and asks no drafter"
    ),
    until="vLLM asks the method whether it needs the drop",
)
PATCHES = (PATCH, WHOLE_HITS)

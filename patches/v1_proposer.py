"""V1 runner: our proposer in the place of vLLM's, for method dflash with our architectures."""

from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: type) -> type:
    from vllm_dflash.drafting.proposer import DFlashProposer as Ours

    class ByArchitecture(type):
        """The runner calls the name and also tests drafters against it, so a class must stand there, for ours and for vLLM's."""

        def __call__(cls, vllm_config: Any, device: Any, runner: Any = None) -> Any:
            architectures = vllm_config.speculative_config.draft_model_config.architectures
            return (Ours if is_ours(architectures) else original)(vllm_config, device, runner)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return ByArchitecture("DFlashProposer", (original,), {"__module__": __name__})


PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:DFlashProposer",
    versions=SUPPORTED_VLLM,
    fingerprints={
        "vllm.v1.spec_decode.dflash:DFlashProposer": "28ca0e03db17ccf3",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": "7ba460b9ef2e677b",
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.load_model": "18b8457cc25ad560",
        # What verification (vllm_dflash/drafting/verification.py, rows.py) is built on.
        "vllm.v1.sample.sampler:Sampler.apply_logits_processors": "d807d7d0cf6f6d5c",
        "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs": "da1f2be0d8510e1e",
        "vllm.v1.sample.rejection_sampler:RejectionSampler": "0bb8ee778a234b05",
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": "27f616101821bc71",
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor": "90e79f6a2eeb8c69",
    },
    why="the runner builds the proposer from this module-level name; the hook there is (method custom_class) gets no hidden states",
    until="vLLM lets a plug-in register a proposer for a method",
    replace=_replace,
)

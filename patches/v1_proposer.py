"""V1 runner: our proposer in the place of vLLM's, for method dflash with our architectures."""

from typing import Any

from vllm_dflash.formats import is_ours
from vllm_dflash.patch import Patch


def _replace(original: type) -> type:
    from vllm_dflash.drafting.v1 import DFlashProposer as Ours

    class ByArchitecture(type):
        """The runner calls the name and also tests drafters against it, so a class must stand
        there, for ours and for vLLM's."""

        def __call__(cls, vllm_config: Any, device: Any, runner: Any = None) -> Any:
            return (Ours if is_ours(vllm_config.speculative_config) else original)(
                vllm_config, device, runner
            )

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return ByArchitecture("DFlashProposer", (original,), {"__module__": __name__})


_DFLASH = "vllm.v1.spec_decode.dflash:DFlashProposer"
_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner:DFlashProposer",
    fingerprints={
        _DFLASH: "28ca0e03db17ccf3",
        f"{_BASE}.propose": "fc11021f8689872b",
        f"{_BASE}.prepare_next_token_ids_padded": "ea33c9c93e8021c2",
        f"{_BASE}.prepare_inputs_padded": "99c938c07e941ed4",
    },
    signatures={
        f"{_BASE}.load_model": "self, target_model",
        f"{_BASE}.build_per_group_and_layer_attn_metadata": "self, common_attn_metadata, ...",
        f"{_BASE}._determine_batch_execution_and_padding": "self, num_tokens, ...",
        f"{_BASE}._greedy_sample": "self, hidden_states",
        f"{_BASE}._sample_draft_tokens": "self, hidden_states, sampling_metadata",
        f"{_RUNNER}.propose_draft_token_ids": "self, scheduler_output, ...",
    },
    why=(
        "the runner builds the proposer from this module-level name; the hook there is (method"
        " custom_class) gets no hidden states"
    ),
    until="vLLM lets a plug-in register a proposer for a method",
    replace=_replace,
)

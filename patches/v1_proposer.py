"""V1 runner: our proposer in the place of vLLM's, for method dflash with our architectures."""

from typing import Any

from vllm_dflash.patches.guard import drafts_ours, part_of_ours

from vllm_dflash.patch import Patch


def _replace(original: type) -> type:
    class ByArchitecture(type):
        """The runner calls the name and also tests drafters against it, so a class must stand
        there, for ours and for vLLM's."""

        def __call__(cls, vllm_config: Any, device: Any, runner: Any = None) -> Any:
            if not drafts_ours(vllm_config, "speculative_config"):
                return original(vllm_config, device, runner)
            ours = part_of_ours("vllm_dflash.drafting.v1", "DFlashProposer")
            return ours(vllm_config, device, runner)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return ByArchitecture("DFlashProposer", (original,), {"__module__": __name__})


_DFLASH = "vllm.v1.spec_decode.dflash:DFlashProposer"
_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

_METADATA = "vllm.v1.attention.backend:CommonAttentionMetadata"
_INHERITED = (
    "_draft_attn_layer_names _enable_probabilistic_draft_probs _last_draft_probs"
    " _slot_mapping_buffer arange block_size device draft_model_config kv_cache_gid max_batch_size"
    " max_model_len model parallel_drafting_token_id positions vllm_config"
)
"""What our proposer reads or sets of what it inherits."""
_READ_OF_METADATA = (
    "block_table_tensor max_seq_len num_actual_tokens num_reqs query_start_loc query_start_loc_cpu"
    " seq_lens seq_lens_cpu_upper_bound slot_mapping replace"
)

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
    names=(
        *(f"{_BASE}.{name}" for name in _INHERITED.split()),
        *(f"{_RUNNER}.{name}" for name in ["input_batch", "requests", "discard_request_mask"]),
        *(f"{_METADATA}.{name}" for name in _READ_OF_METADATA.split()),
        "vllm.config.cache:CacheConfig.prefix_match_unit",
        "vllm.v1.worker.gpu_input_batch:CachedRequestState.block_ids",
        "vllm.v1.worker.gpu_input_batch:InputBatch.req_ids",
        "vllm.v1.worker.gpu_input_batch:InputBatch.num_computed_tokens_cpu",
    ),
    looked_up={f"{_RUNNER}.__init__": ("DFlashProposer",)},
    why=(
        "the runner builds the proposer from this module-level name; the hook there is (method"
        " custom_class) gets no hidden states"
    ),
    until="vLLM lets a plug-in register a proposer for a method",
    replace=_replace,
)

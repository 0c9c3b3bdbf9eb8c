"""The drafter's layers: what of vLLM's they extend."""

from vllm_dflash.patch import Patch

_LAYERS = "vllm.model_executor.layers"
_RELOAD = "vllm.model_executor.model_loader.reload"

PATCH = Patch(
    target=f"{_LAYERS}.attention:Attention",
    scope="ours",
    fingerprints={
        f"{_LAYERS}.attention:Attention.get_kv_cache_spec": "2b8789b1c389d61d",
        f"{_LAYERS}.layernorm:RMSNorm.forward_native": "a00ebc367406527b",
    },
    # Imported by ``models/``, or asked of a layer while its weights are loaded anew.
    names=(
        "vllm:_custom_ops",
        "vllm.compilation.decorators:support_torch_compile",
        "vllm.config:CacheConfig",
        "vllm.config:VllmConfig",
        "vllm.distributed:get_tensor_model_parallel_rank",
        "vllm.distributed:get_tensor_model_parallel_world_size",
        "vllm.platforms:current_platform",
        f"{_LAYERS}.layernorm:RMSNorm",
        f"{_LAYERS}.linear:QKVParallelLinear",
        f"{_LAYERS}.linear:ReplicatedLinear",
        f"{_LAYERS}.linear:RowParallelLinear",
        f"{_LAYERS}.logits_processor:LogitsProcessor",
        f"{_LAYERS}.rotary_embedding:get_rope",
        f"{_LAYERS}.vocab_parallel_embedding:ParallelLMHead",
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding",
        "vllm.model_executor.kernels.linear.mixed_precision.cpu:CPUWNA16LinearKernel",
        f"{_RELOAD}:finalize_layerwise_reload",
        f"{_RELOAD}:initialize_layerwise_reload",
        f"{_RELOAD}:record_metadata_for_reloading",
        f"{_RELOAD}.layerwise:get_layerwise_info",
        f"{_RELOAD}.types:LayerReloadingInfo.can_load",
        "vllm.model_executor.models.qwen2:Qwen2MLP",
        "vllm.model_executor.models.utils:get_draft_quant_config",
        "vllm.model_executor.models.utils:maybe_prefix",
        "vllm.model_executor.utils:set_weight_attrs",
        "vllm.transformers_utils.repo_utils:get_hf_file_bytes",
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "vllm.v1.kv_cache_interface:KVCacheSpec",
        "vllm.v1.kv_cache_interface:SlidingWindowSpec",
    ),
    why=(
        "on the V1 runner sliding draft layers keep the whole context, as it knows one KV cache"
        " group for them; and a norm is one kernel on a CPU. The model itself has an official"
        " place, vLLM's registry of models"
    ),
    until="the V1 runner takes several KV cache groups of draft layers",
)

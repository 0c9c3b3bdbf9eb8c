"""CPU: what the layers of drafter and target rely on where they run kernel by kernel."""

from vllm_dflash.patch import Patch

_CPU = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"
_LINEAR = "vllm.model_executor.layers.linear"
_LAYERS = "vllm.model_executor.layers"
_ATTENTION = f"{_LAYERS}.attention.attention"
_LOGITS = f"{_LAYERS}.logits_processor:LogitsProcessor"
_UNTIL = "vLLM's CPU build records what it runs, as CUDA graphs do"
_GEMM = {
    f"{_LAYERS}.utils:cpu_unquantized_gemm": "91ba507f4b7597b6",
    f"{_LAYERS}.utils:dispatch_cpu_unquantized_gemm": "fa9bad87bd635a9b",
    f"{_LAYERS}.utils:dispatch_unquantized_gemm": "105b10792257faea",
    "vllm._custom_ops:create_onednn_mm": "fa092f2e75fcaeab",
    "vllm._custom_ops:CPUDNNLGEMMHandler": "7def9e96fa90e177",
    "vllm._custom_ops:onednn_mm": "7ddd8fbdaec84eab",
}

PATCH = Patch(
    target=_CPU,
    scope="ours",
    needs="optional",
    fingerprints={
        f"{_CPU}.forward": "3809c0743bc088b9",
        f"{_CPU}.do_kv_cache_update": "7fa9bfd2248a31a3",
        f"{_LAYERS}.attention:Attention.forward": {
            "0.32": "919186a00115492f",
            "0.33": "35db5405fdf9cbc6",
        },
        f"{_ATTENTION}:unified_attention_with_output": "6ccc85b077f77ad2",
        f"{_ATTENTION}:unified_kv_cache_update": "15c42e35b1527a99",
        f"{_ATTENTION}:get_attention_context": "b031f2543656ef85",
        "vllm._custom_ops:cpu_attention_with_kv_cache": "09e9c5e678935648",
        "vllm._custom_ops:cpu_attn_reshape_and_cache": "04f49aaf077158bd",
        **_GEMM,
        f"{_LINEAR}:UnquantizedLinearMethod.apply": "9f33567159bae1a6",
        f"{_LINEAR}:ColumnParallelLinear.forward": "7ab531913cb118c1",
        f"{_LINEAR}:ReplicatedLinear.forward": "294a54e3a9c8ae97",
        f"{_LINEAR}:RowParallelLinear.forward": "99e348fb44338352",
        f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding": (
            "1056ddd6d0692b53"
        ),
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding.forward": "f37917a90dd53d88",
        f"{_LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_cpu": "bcf30919fa9727e2",
        "vllm._custom_ops:rotary_embedding": "df31775366c45cd2",
    },
    why=(
        "run as modules, half of a forward of one request is Python between kernels: the same"
        " kernels are called one after the other. There is no hook for that, nor is one needed"
    ),
    until=_UNTIL,
)
LOGITS = Patch(
    target=f"{_LOGITS}.forward",
    scope="ours",
    needs="optional",
    fingerprints={
        **_GEMM,
        f"{_LOGITS}.forward": "61ec03a3ebe863fd",
        f"{_LOGITS}._get_logits": "fd1a27b09200dd6c",
        f"{_LOGITS}._apply_head": "8c0cc6cb5adff22c",
        f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply": (
            "64b2cfc332b47127"
        ),
    },
    why=(
        "the drafter's logits are one kernel's; where the modules would do more to them than"
        " multiply by the head, drafts would be other tokens than the target's"
    ),
    until=_UNTIL,
)
PATCHES = (PATCH, LOGITS)

"""The drafter's layers: what of vLLM's they extend."""

from vllm_dflash.patch import Patch

_LAYERS = "vllm.model_executor.layers"

PATCH = Patch(
    target=f"{_LAYERS}.attention:Attention",
    scope="ours",
    fingerprints={
        f"{_LAYERS}.attention:Attention.get_kv_cache_spec": "2b8789b1c389d61d",
        f"{_LAYERS}.layernorm:RMSNorm.forward_native": "1e4b2b94b1ce009a",
    },
    why=(
        "on the V1 runner sliding draft layers keep the whole context, as it knows one KV cache"
        " group for them; and a norm is one kernel on a CPU. The model itself has an official"
        " place, vLLM's registry of models"
    ),
    until="the V1 runner takes several KV cache groups of draft layers",
)

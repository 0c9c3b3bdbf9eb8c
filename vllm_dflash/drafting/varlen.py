"""Whether one CUDA graph of a target does for requests of unlike lengths: drafts that are cut by
request, and steps without any.

vLLM records the target's graphs for whole drafts alone, K + 1 tokens a request; all other steps
have none of their attention. For its own adaptive verification it records such that take any
lengths, where the attention can.

    pytest tests/patches/test_target_graphs.py tests/engine/test_v2_profile.py
"""

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport


def replays_all_lengths(vllm_config: VllmConfig, longest: int) -> bool:
    """Whether the graphs of all the target's attention layers can be replayed with 1 to ``longest``
    tokens a request."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    for layer in layers.values():
        spec = None if layer.is_draft_layer else layer.get_kv_cache_spec(vllm_config)
        if spec is None:  # the drafter's, or one that reads another's keys and values
            continue
        builder = layer.get_attn_backend().get_builder_cls()
        support = builder.get_cudagraph_support(vllm_config, spec)
        if support == AttentionCGSupport.ALWAYS:
            continue
        most = builder.get_varlen_cudagraph_max_query_len(vllm_config, spec)
        if support == AttentionCGSupport.NEVER or most is None or most < longest:
            return False
    return True

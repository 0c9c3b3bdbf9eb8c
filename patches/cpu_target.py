"""CPU: the target's layers run kernel by kernel beside a drafter, to the last bit what vLLM's
modules compute."""

from typing import Any

from vllm_dflash.patches import cpu_layers

from vllm_dflash.patch import Patch


def _replace(original: Any, model: Any) -> Any:
    from vllm_dflash.cpu.target_layers import EagerTarget

    return EagerTarget(model)


_MODELS = "vllm.model_executor.models"
_LAYERS = "vllm.model_executor.layers"

PATCH = Patch(
    target=f"{_MODELS}.qwen2:Qwen2Model.forward",
    scope="instance",
    needs="optional",
    fingerprints={
        **cpu_layers.PATCH.fingerprints,
        f"{_MODELS}.qwen2:Qwen2Model.forward": "084d26fb4e1e559b",
        f"{_MODELS}.qwen2:Qwen2Model.embed_input_ids": "270fff45169289dc",
        f"{_MODELS}.interfaces:EagleModelMixin": "2931519f21c4dd27",
        f"{_MODELS}.qwen2:Qwen2MLP": "08041865ce4038a8",
        f"{_MODELS}.qwen3:Qwen3Attention": "dc2f9c64955b5a22",
        f"{_MODELS}.qwen3:Qwen3DecoderLayer": "b8db4584dee92972",
        f"{_MODELS}.qwen3:Qwen3Model": "d53a91e5a8e50063",
        f"{_LAYERS}.layernorm:RMSNorm.forward_native": "1e4b2b94b1ce009a",
        "vllm.ir.ops.layernorm:rms_norm": "12044f5e1b907e37",
        "vllm.ir.ops.layernorm:fused_add_rms_norm": "8785226184c83678",
        f"{_LAYERS}.activation:SiluAndMul": "e1bb742c2f34d62a",
    },
    why=(
        "as cpu_layers.py; where its source is not the one that was repeated, the target would"
        " write another text, so vLLM's modules run. A model is built by vLLM, and no plug-in is"
        " asked how it runs"
    ),
    until="vLLM's CPU build records what it runs, as CUDA graphs do",
    replace=_replace,
)

"""CPU: the target's layers run kernel by kernel beside a drafter, to the last bit what vLLM's
modules compute. One record an architecture, so that each drops out alone."""

from typing import Any

from vllm_dflash.patches import cpu_layers

from vllm_dflash.patch import Patch


def _replace(original: Any, model: Any) -> Any:
    from vllm_dflash.cpu.target_layers import EagerTarget

    return EagerTarget(model)


_MODELS = "vllm.model_executor.models"
_LAYERS = "vllm.model_executor.layers"
_IR = "vllm.ir.op"


def _record(target: str, fingerprints: dict[str, str]) -> Patch:
    """Of the model class whose ``forward`` is replaced in the loaded target."""
    return Patch(
        target=target,
        scope="instance",
        needs="optional",
        fingerprints={
            **cpu_layers.PATCH.fingerprints,
            f"{_MODELS}.interfaces:EagleModelMixin": "2931519f21c4dd27",
            # A call of a norm is these two; ``dispatch.py`` sees whether a class has its own.
            "vllm.model_executor.custom_op:CustomOp.forward": "6d01cf24b16e8252",
            "vllm.model_executor.custom_op:CustomOp.forward_cpu": "0ccb0330e5b22a4f",
            f"{_LAYERS}.layernorm:RMSNorm.forward_native": "a00ebc367406527b",
            "vllm.ir.ops.layernorm:rms_norm": "12044f5e1b907e37",
            "vllm.ir.ops.layernorm:fused_add_rms_norm": "8785226184c83678",
            # How an implementation of these two is chosen; ``dispatch.py`` asks for the choice.
            f"{_IR}:IrOp.__call__": "ace29b03648b5bd3",
            f"{_IR}:IrOp._inner_call": "f6157a8904bf2c0f",
            f"{_IR}:IrOp.dispatch": "dec1f0e4757f0283",
            f"{_IR}:IrOp.get_priority": "4ab318411ede7032",
            f"{_IR}:IrOpInplaceOverload.__call__": "ace29b03648b5bd3",
            f"{_IR}:IrOpInplaceOverload._inner_call": "a4beaaa217c5cf1c",
            f"{_LAYERS}.activation:SiluAndMul": "e1bb742c2f34d62a",
            **fingerprints,
        },
        why=(
            "as cpu_layers.py; where its source is not the one that was repeated, the target would"
            " write another text, so vLLM's modules run. A model is built by vLLM, and no plug-in"
            " is asked how it runs"
        ),
        until="vLLM's CPU build records what it runs, as CUDA graphs do",
        replace=_replace,
    )


QWEN3 = _record(
    f"{_MODELS}.qwen2:Qwen2Model.forward",
    {
        f"{_MODELS}.qwen2:Qwen2Model.__init__": "a64769e18e318676",
        f"{_MODELS}.qwen2:Qwen2Model.forward": "0a26bc407aacac6d",
        f"{_MODELS}.qwen2:Qwen2Model.embed_input_ids": "0eb9cc30747ed332",
        f"{_MODELS}.qwen2:Qwen2MLP": "08041865ce4038a8",
        f"{_MODELS}.qwen3:Qwen3Attention": "dc2f9c64955b5a22",
        f"{_MODELS}.qwen3:Qwen3DecoderLayer": "b8db4584dee92972",
        f"{_MODELS}.qwen3:Qwen3Model": "d53a91e5a8e50063",
        # What they change inside of the model that they make would not be seen.
        f"{_MODELS}.qwen3:Qwen3ForCausalLM.__init__": "a2be11dac2f931b4",
    },
)
LLAMA = _record(
    f"{_MODELS}.llama:LlamaModel.forward",
    {
        f"{_MODELS}.llama:LlamaModel.__init__": "204c98571e1fab02",
        f"{_MODELS}.llama:LlamaModel.forward": "b286aa0045f2e8b7",
        f"{_MODELS}.llama:LlamaModel.embed_input_ids": "7e0842dff946cf15",
        f"{_MODELS}.llama:LlamaMLP": "1c9b9ffb406f2097",
        f"{_MODELS}.llama:LlamaAttention": "2757935ec5ed4a11",
        f"{_MODELS}.llama:LlamaDecoderLayer": "178aba69b178169e",
        f"{_MODELS}.llama:LlamaForCausalLM.__init__": "5a532838114ad172",
        f"{_LAYERS}.fusion.fused_act_quant:maybe_fused_act_quant": "690c250c724863fb",
        f"{_LAYERS}.fusion.quant_activation:get_input_quant_key": "251b778e08c40b0e",
    },
)
PATCHES = (QWEN3, LLAMA)

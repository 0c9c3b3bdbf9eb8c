"""Small random targets of other model families, with every norm weight random: what a drafter can
be conditioned on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB, HIDDEN, SPOKEN = 512, 64, 6
_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=VOCAB - 1,
    pad_token_id=None,
)
_EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_SHAPE, num_hidden_layers=5, head_dim=32)


def _mistral() -> Any:
    """vLLM's Mistral extends each of its Llama's classes."""
    from transformers import MistralConfig

    return MistralConfig(**_SHAPE, num_hidden_layers=5, head_dim=32)


def _phi3() -> Any:
    """vLLM's Phi-3 is its Llama under another name."""
    from transformers import Phi3Config

    return Phi3Config(
        **_SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1}, num_hidden_layers=5
    )


def _qwen2() -> Any:
    """Biases in its projections, and one KV head."""
    from transformers import Qwen2Config

    return Qwen2Config(
        **_SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1}, num_hidden_layers=5
    )


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_SHAPE, **_EXPERTS, num_hidden_layers=5, head_dim=32, norm_topk_prob=True
    )


def _gemma4() -> Any:
    """Its embedding ends in a factor, and its logits in a cap; all of its layers attend to
    everything."""
    from transformers import Gemma4TextConfig

    layers = 5
    return Gemma4TextConfig(
        **_SHAPE,
        num_hidden_layers=layers,
        head_dim=32,
        global_head_dim=32,
        layer_types=["full_attention"] * layers,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
        final_logit_softcapping=20.0,
    )


def _nemotron_h() -> Any:
    """Mamba-2, attention and MLP layers, each a layer of its own."""
    from transformers import NemotronHConfig

    kinds = [
        "linear_attention",
        "mlp",
        "linear_attention",
        "full_attention",
        "linear_attention",
        "mlp",
        "linear_attention",
    ]
    return NemotronHConfig(
        **_SHAPE,
        layers_block_type=kinds,
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        expand=2,
        chunk_size=32,
    )


def _qwen3_next() -> Any:
    """Gated delta-rule layers, whose heads have the one size that vLLM's CPU kernels know, and one
    of full attention.

    Every token goes to all four experts: in bfloat16 a choice between nearly equal ones would be a
    throw of dice.
    """
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig(
        **_SHAPE,
        **_EXPERTS | {"num_experts_per_tok": 4},
        num_hidden_layers=5,
        shared_expert_intermediate_size=32,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["linear_attention"] * 2 + ["full_attention"] + ["linear_attention"] * 2,
    )


@dataclass(frozen=True)
class Family:
    """A model family, and the layers that its drafter is conditioned on."""

    config: Callable[[], Any]
    target_layer_ids: tuple[int, ...] = (0, 2, 4)

    def make(
        self, folder: Path, seed: int = 0, scale: float = 0.08, spoken: int = SPOKEN, **changes: Any
    ) -> Path:
        """A random model in ``folder``: float32 on disk, its weights numbers that bfloat16 has too;
        ``changes`` go to its config.

        It writes one of ``spoken`` tokens, as a drafter with the same lm_head then does: some
        drafts are accepted.
        """
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        config = self.config()
        config.update(changes)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.uniform_(0.5, 1.5)
                elif p.dim() > 1 or name.endswith("_proj.bias"):
                    p.normal_(0, scale)
                p.copy_(p.bfloat16())
            model.lm_head.weight[spoken:] = 0
        model.save_pretrained(folder)
        return folder


FAMILIES = {
    "llama": Family(_llama),
    "qwen2": Family(_qwen2),
    "qwen3 moe": Family(_qwen3_moe),
    "gemma 4": Family(_gemma4),
    "nemotron-h": Family(_nemotron_h),
    "qwen3-next": Family(_qwen3_next),
}
EXTENDING_LLAMA = {"mistral": Family(_mistral), "phi-3": Family(_phi3)}

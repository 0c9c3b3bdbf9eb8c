"""The frozen target: its config and tokenizer, and the whole model in plain PyTorch once a stage
needs it.

Limits: decoder layers at ``model.layers`` and an ``lm_head`` (Qwen3, Llama and their like), one
device.
Tests: ``pytest tests/unit/test_train_drafter.py``.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_dflash import hub, smollm2
from vllm_dflash.pairing import TargetShape
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.settings import Settings


@dataclass(frozen=True)
class Target:
    """What is known of a target without its weights."""

    name: str
    """As it was given."""
    config: Any
    """Its Hugging Face config, the text part."""
    tokenizer: Any
    """None where it has none."""
    dtype: str
    """In which it runs: float32 and the like, never auto."""

    @property
    def path(self) -> str:
        """What loads it: its folder or hub id."""
        return smollm2.resolve(self.name)

    @property
    def shape(self) -> TargetShape:
        return TargetShape.from_hf(self.config)

    @property
    def eos_token_id(self) -> int | None:
        """The first, where it has several."""
        return hub.eos_token_id(self.config)


def find_target(settings: Settings) -> Target:
    """Reads the target's config and tokenizer.

    Raises:
        TrainingError: it cannot be read.
    """
    name, trusted = settings.run.target, settings.run.trust_remote_code
    path = smollm2.resolve(name)
    try:
        text = hub.load_config(path, trusted).get_text_config()
    except hub.TargetError as error:
        raise TrainingError(f"target {error}") from None
    return Target(
        name, text, hub.load_tokenizer(path, trusted), hub.resolved_dtype(text, settings.run.dtype)
    )


def load_target(target: Target, settings: Settings, device: str) -> Any:
    """The model itself, frozen, in eval mode.

    Raises:
        TrainingError: it has no ``model.layers``.
    """
    model = hub.load_model(target.path, target.dtype, device, settings.run.trust_remote_code)
    if not hasattr(getattr(model, "model", None), "layers") or not hasattr(model, "lm_head"):
        raise TrainingError(
            f"{type(model).__name__} has no model.layers and lm_head, where features are taken:"
            " train for another target"
        )
    return model.requires_grad_(False)


def parameters(target: Target, settings: Settings) -> int:
    """How many the model has, from its shape; no weight is read."""
    return hub.count_parameters(target.config, settings.run.trust_remote_code)


def device() -> str:
    """Where this process trains: its own CUDA device, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"

"""How the target's features become the context that a drafter attends to: one file a kind.

A kind's file says which tensors it owns (``own_tensors``), what it computes in plain PyTorch (``Reference``, which is trained
and is the oracle) and what it computes in vLLM (``Served``). Everything else of a drafter is shared. docs/conditioning.md
shows how to add one.
"""

from importlib import import_module
from types import ModuleType

from vllm_dflash.config import CONDITIONINGS, DrafterConfig


def kind_of(config: DrafterConfig) -> ModuleType:
    """The file of the drafter's kind."""
    assert config.conditioning in CONDITIONINGS
    return import_module(f"{__name__}.{config.conditioning}")


def own_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that only this kind has, by name, with their shapes."""
    return kind_of(config).own_tensors(config)


def capture_order(config: DrafterConfig) -> list[int]:
    """The drafter's feature that each captured one is: vLLM hands features out by ascending layer, whatever order they were asked for in."""
    return sorted(range(config.num_features), key=config.target_layer_ids.__getitem__)

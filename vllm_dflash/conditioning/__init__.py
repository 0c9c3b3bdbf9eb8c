"""How the target's features become the context that a drafter attends to: one file a kind.

A kind's file says which tensors it owns (``own_tensors``), what it computes in plain PyTorch (``Reference``, which is trained
and is the oracle) and what it computes in vLLM (``Served``). Everything else of a drafter is shared. docs/conditioning.md
shows how to add one.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from vllm_dflash.config import CONDITIONINGS, DrafterConfig

_OF_LAYER = re.compile(r"layers\.(\d+)\.self_attn\.(\w+)\.(\w+)")


class ServedContext(Protocol):
    """What vLLM runs of a kind: its class ``Served``."""

    attentions: Sequence[Any]
    """The draft layers' attention modules, in order; set once they are made."""

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order."""

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, C]."""

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, C] -> keys and values [N, D, kv heads, head_dim], before k_norm and rotary."""


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


def of_layer(name: str) -> tuple[int, str, str]:
    """Draft layer, module and parameter of an attention's tensor, as ``(2, "k_proj", "bias")``; ``(-1, "", "")`` for other names."""
    found = _OF_LAYER.fullmatch(name)
    return (int(found[1]), found[2], found[3]) if found else (-1, "", "")


def own_heads(tensor: Tensor, config: DrafterConfig, num_kv_heads: int) -> Tensor:
    """The rows [all kv heads * head_dim, ...] that belong to this rank's ``num_kv_heads``; ranks share a head where there are fewer heads."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    first = get_tensor_model_parallel_rank() * config.num_key_value_heads // get_tensor_model_parallel_world_size()
    return tensor[first * config.head_dim : (first + num_kv_heads) * config.head_dim]


def in_parts(parameter: Any) -> Any:
    """``parameter``, a new one, which ``load_into`` then fills in parts: it holds several tensors of a checkpoint."""
    from vllm.model_executor.utils import set_weight_attrs

    set_weight_attrs(parameter, {"weight_loader": _load_part})
    return parameter


def load_into(parameter: Any, tensor: Tensor, *part: Any) -> None:
    """Loads a tensor, or a ``part`` (an index) of an ``in_parts`` parameter, by the parameter's own loader.

    Never past it: vLLM hangs its own in front where new weights come into an engine that runs, to pack them once a layer is whole.
    """
    getattr(parameter, "weight_loader", _load)(parameter, tensor, *part)


# vLLM finds the parameter by its argument's name.
def _load(param: Tensor, loaded_weight: Tensor) -> None:
    param.data.copy_(loaded_weight)


def _load_part(param: Tensor, loaded_weight: Tensor, part: Any) -> None:
    param.data[part].copy_(loaded_weight)

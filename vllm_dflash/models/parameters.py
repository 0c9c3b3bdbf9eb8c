"""What served contexts and heads share: an interface, and how parameters take a tensor.

Weights are loaded by ``load_into``, a parameter that is made of several tensors by ``in_parts``:
vLLM follows both when new weights come into an engine that runs.

    pytest tests/unit/test_kinds.py tests/engine/test_reload.py
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vllm_dflash.config import DrafterConfig

if TYPE_CHECKING:
    from vllm_dflash.heads import Draft, Ranked, Ranking

_OF_LAYER = re.compile(r"layers\.(\d+)\.self_attn\.(\w+)\.(\w+)")


class ServedContext(nn.Module):
    """What vLLM runs of a kind: the base of its class ``Served``."""

    attentions: Sequence[Any] = ()
    """The draft layers' attention modules, in order; set once they are made. No module list, or
    they would be registered a second time."""

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order."""
        raise NotImplementedError

    def combine(self, features: Tensor) -> Tensor:
        """``features`` [N, T * H] -> context [N, C]."""
        raise NotImplementedError

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``context`` [N, C] -> keys and values [N, D, kv heads, head_dim], before k_norm and
        rotary."""
        raise NotImplementedError


class ServedHead(nn.Module):
    """What vLLM's model runners call of a kind: the base of its head's class ``Served``."""

    def load(self, name: str, tensor: Tensor) -> None:
        """Takes what it needs of one tensor of a checkpoint, in any order."""
        raise NotImplementedError

    def draft(self, hidden: Tensor, anchors: Tensor, k: int, ranking: "Ranking") -> "Ranked":
        """What is drafted for B requests.

        Args:
            hidden: [B * K, H], the rows that predict, request after request.
            anchors: [B] int32, the token before each request's.
            k: K.
        """
        raise NotImplementedError


class ServedTensors(ServedHead):
    """A head whose parameters are its own tensors of a checkpoint, each as it is there, whole on
    every rank."""

    def __init__(
        self, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, float32: str = ""
    ) -> None:
        """Those of ``tensors``, names to shapes, whose names begin with ``float32`` are kept in
        that."""
        super().__init__()
        for name, shape in tensors.items():
            kept_in = torch.float32 if float32 and name.startswith(float32) else dtype
            empty = torch.empty(shape, dtype=kept_in)
            self.register_parameter(_attribute(name), nn.Parameter(empty, requires_grad=False))

    def own(self, name: str) -> Any:
        """The parameter that holds the tensor ``name``; None where there is no such tensor."""
        return self._parameters.get(_attribute(name))

    def load(self, name: str, tensor: Tensor) -> None:
        if (place := self.own(name)) is not None:
            load_into(place, tensor)


def _attribute(name: str) -> str:
    return name.replace(".", "_")  # a parameter's own has no dots


def within_vocabulary(draft: "Draft", vocab_size: int) -> "Draft":
    """``draft`` for anchors that the drafter has no rows for, as it has none for the padding of its
    target's embedding: they count as its last token."""

    def drafting(hidden: Tensor, anchors: Tensor, k: int, ranking: "Ranking") -> "Ranked":
        return draft(hidden, anchors.clamp(max=vocab_size - 1), k, ranking)

    return drafting


class FastContext(Protocol):
    """What a ``ServedContext`` may have besides, for a CPU that does not compile."""

    def fast(self) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """``combine`` and ``project`` in one, kernel by kernel; None where these weights cannot."""


def capture_order(config: DrafterConfig) -> list[int]:
    """The drafter's feature that each captured one is: vLLM hands features out by ascending layer,
    whatever order they were asked for in."""
    return sorted(range(config.num_features), key=config.target_layer_ids.__getitem__)


def of_layer(name: str) -> tuple[int, str, str]:
    """Draft layer, module and parameter of an attention's tensor, as ``(2, "k_proj", "bias")``;
    ``(-1, "", "")`` for other names."""
    found = _OF_LAYER.fullmatch(name)
    return (int(found[1]), found[2], found[3]) if found else (-1, "", "")


def own_heads(tensor: Tensor, config: DrafterConfig, num_kv_heads: int) -> Tensor:
    """The rows [all kv heads * head_dim, ...] that belong to this rank's ``num_kv_heads``; ranks
    share a head where there are fewer heads."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    first = (
        get_tensor_model_parallel_rank()
        * config.num_key_value_heads
        // get_tensor_model_parallel_world_size()
    )
    return tensor[first * config.head_dim : (first + num_kv_heads) * config.head_dim]


def in_parts(parameter: Any) -> Any:
    """``parameter``, a new one, which ``load_into`` then fills in parts: it holds several tensors
    of a checkpoint."""
    from vllm.model_executor.utils import set_weight_attrs

    set_weight_attrs(parameter, {"weight_loader": _load_part})
    return parameter


def load_into(parameter: Any, tensor: Tensor, *part: Any) -> None:
    """Loads a tensor, or a ``part`` (an index) of an ``in_parts`` parameter, by the parameter's own
    loader.

    Never past it: vLLM hangs its own in front where new weights come into an engine that runs, to
    pack them once a layer is whole.
    """
    getattr(parameter, "weight_loader", _load)(parameter, tensor, *part)


# vLLM finds the parameter by its argument's name.
def _load(param: Tensor, loaded_weight: Tensor) -> None:
    param.data.copy_(loaded_weight)


def _load_part(param: Tensor, loaded_weight: Tensor, part: Any) -> None:
    param.data[part].copy_(loaded_weight)

"""What stands for a GPU's CUDA graphs and for its waits, with tensors of a CPU.

- ``Tape``: what a captured graph is. Capture records each operator with its tensors; replay runs
  the same operators on the same tensors, while Python's control flow, scalars and shapes stay what
  they were. What capture made holds garbage before each replay, as a graph's memory pool does.
- ``Watch``: an operator or method that would wait for a device's tensor raises
  ``HostWaitError``, in capture and in every step.
Limits: Triton's kernels are not recorded, so none may run in a graph; ``Tensor.to`` of a host is
not told from that of the device.

    pytest tests/engine/test_v2_graphs.py
"""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

SIZES = [1, 2, 4, 8, 16, 24, 32]
"""The engine's capture sizes, in tokens."""
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "lift_fresh",
    "lift_fresh_copy",
}
"""Operators of torch.ops.aten after which, or for which, a host waits for its device."""
METHODS = {"tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__"}


class HostWaitError(Exception):
    """The host would wait for the device here."""


def _tensors(*things: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(things)[0] if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator makes the host wait where its tensors are a device's."""
    name = func._schema.name.removeprefix("aten::")
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and not isinstance(args[-1], int)
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        return any(t.dtype == torch.bool for t in _tensors(args[1]))
    return name in WAITS


class Device:
    """The tensors that a GPU would hold: those of ``roots`` and all that is computed of them."""

    def __init__(self, *roots: Any) -> None:
        self.storages: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._seen: set[int] = set()
        for root in roots:
            self._walk(root)

    def _walk(self, thing: Any) -> None:
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            self.add(thing)
        elif isinstance(thing, dict):
            for name, value in thing.items():
                if not (isinstance(name, str) and ("cpu" in name or name in HOST)):
                    self._walk(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                self._walk(value)
        elif type(thing).__module__.startswith(("vllm", "torch.nn")) and hasattr(thing, "__dict__"):
            self._walk(vars(thing))

    def add(self, tensor: torch.Tensor) -> None:
        self.storages.add(_storage(tensor))
        # Kept, as the place of a freed one would be given to a tensor of the host.
        self._kept.append(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self.storages


HOST = {"draft_is_prefilling", "seq_lens_cpu_upper_bound", "vllm_config", "_kept"}
"""Attributes whose tensors are the host's on a GPU too."""


class Watch(TorchDispatchMode):
    """Raises where the host would wait for a tensor of ``device``."""

    def __init__(self, *devices: Device) -> None:
        super().__init__()
        self.computed = set[int]().union(*(device.storages for device in devices))
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors(args, kwargs)
        out = func(*args, **kwargs or {})
        if INTERPRETING or not any(_storage(t) in self.computed for t in inputs):
            return out
        if waits(func, args, kwargs or {}):
            raise HostWaitError(f"{func} of a device's tensor")
        for tensor in _tensors(out):
            self.computed.add(_storage(tensor))
            self._kept.append(tensor)
        return out


class WatchMethods(TorchFunctionMode):
    """The same for a tensor's methods that are no operators."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (
            not INTERPRETING
            and name in METHODS
            and isinstance(args[0], torch.Tensor)
            and _storage(args[0]) in self.watch.computed
        ):
            raise HostWaitError(f"Tensor.{name} of a device's tensor")
        return func(*args, **kwargs or {})


INTERPRETING: list[bool] = []
"""Not empty while a Triton kernel is interpreted, which reads its tensors as a device does."""


class Tape(TorchDispatchMode):
    """A CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.made: set[int] = set()
        self.foreign: list[torch.Tensor] = []
        """What it reads or writes and has not made."""
        self.work: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if INTERPRETING:
            raise HostWaitError("a Triton kernel in a graph: these tapes do not record one")
        if waits(func, args, kwargs):
            raise HostWaitError(f"{func} in a graph")
        out = func(*args, **kwargs)
        inputs, outputs = _tensors(args, kwargs), _tensors(out)
        known = {_storage(t) for t in inputs}
        fresh = [t for t in outputs if _storage(t) not in known]
        self.foreign += [t for t in inputs if _storage(t) not in self.made]
        self.made |= {_storage(t) for t in fresh}
        if fresh or func._schema.is_mutable:
            self.operators.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        for *_, fresh in self.operators:
            for tensor in fresh:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        for func, args, kwargs, fresh in self.operators:
            out = _tensors(func(*args, **kwargs))
            for old, new in zip(fresh, out[-len(fresh) :] if fresh else [], strict=True):
                if "empty" not in func._schema.name:
                    old.copy_(new)

"""A stand-in for a GPU under the interpreted V2 runner: draft attention that reads device tensors
only, CUDA graphs as tapes, and errors where the host would wait.

- ``DeviceAttention``: vLLM's CPU attention makes its plan on the host; here are some lines of torch
  over the block table, the sequence lengths and the slots that a GPU's kernels get.
- ``Tape``: what a captured graph is. Capture records each operator with its tensors; replay runs
  the same operators on the same tensors, while Python's control flow, scalars and shapes stay what
  they were. What capture made holds garbage before each replay, as a graph's memory pool does.
- ``Watch``: an operator or method that would wait for a device's tensor raises
  ``HostWaitError``, in capture and in every step.
- ``poison``: the speculator's buffers hold what no step may read, between steps.
Limits: one process, greedy drafts, full attention without a causal mask; Triton's kernels are not
recorded, so none may run in a graph.

    pytest tests/engine/test_v2_graphs.py
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
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


class DeviceAttention:
    """The draft layers' KV cache and attention, of device tensors only."""

    def __init__(self, speculator: Any) -> None:
        from vllm.forward_context import get_forward_context

        config = speculator.kv_cache_config
        self.context, self.speculator = get_forward_context, speculator
        (self.page,) = {group.kv_cache_spec.block_size for group in config.kv_cache_groups}
        self.slots = config.num_blocks * self.page
        self.caches: dict[str, torch.Tensor] = {}
        for layer in speculator.model.model.layers:
            module = layer.self_attn
            assert not module.causal
            attention, shape = module.attn, (self.slots + 1, module.num_kv_heads, module.head_dim)
            # What no position holds yet would turn every draft that attends to it.
            cache = torch.full((2, *shape), 1e3, dtype=speculator.dtype)
            self.caches[attention.layer_name] = cache
            attention.forward = self._forward(attention.layer_name, cache, module)
            attention.impl.do_kv_cache_update = self._update(cache)

    def _update(self, cache: torch.Tensor) -> Callable[..., None]:
        def update(layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
            # Rows that write nothing write past the end here.
            places = torch.where(slots < 0, self.slots, slots)
            cache[0].index_copy_(0, places, key.reshape(-1, *cache.shape[2:]))
            cache[1].index_copy_(0, places, value.reshape(-1, *cache.shape[2:]))

        return update

    def _forward(self, name: str, cache: torch.Tensor, module: Any) -> Callable[..., Any]:
        update = self._update(cache)

        def forward(query: Any, key: Any, value: Any) -> torch.Tensor:
            context = self.context()
            if context.attn_metadata is None:
                return torch.zeros_like(query)
            metadata = context.attn_metadata[name]
            rows = len(query)
            update(None, key, value, None, context.slot_mapping[name][:rows])
            requests = len(metadata.seq_lens)
            positions = torch.arange(self.speculator.max_model_len)
            slots = (
                metadata.block_table[:, positions // self.page].long() * self.page
                + positions % self.page
            )
            keys, values = cache[0][slots].float(), cache[1][slots].float()
            heads = query.view(
                requests, rows // requests, module.num_kv_heads, -1, module.head_dim
            ).float()
            scores = torch.einsum("rqhgd,rkhd->rhgqk", heads, keys) * module.head_dim**-0.5
            seen = positions[None] < metadata.seq_lens[:, None]
            scores = scores.masked_fill(~seen[:, None, None, None], float("-inf"))
            mixed = torch.einsum("rhgqk,rkhd->rqhgd", scores.softmax(-1).nan_to_num(0.0), values)
            return mixed.reshape(rows, -1).to(query.dtype)

        return forward


def metadata(
    attn_groups: Any, num_reqs: int, seq_lens: Any, block_tables: Any, **others: Any
) -> dict[str, Any]:
    """What ``DeviceAttention`` reads, in the place of vLLM's ``build_attn_metadata``."""
    return {
        name: SimpleNamespace(
            seq_lens=seq_lens[:num_reqs], block_table=block_tables[index][:num_reqs]
        )
        for index, groups in enumerate(attn_groups)
        for group in groups
        for name in group.layer_names
    }


def poison(speculator: Any) -> None:
    """Fills what a step leaves behind with what the next one may not read."""
    last = speculator.max_model_len - 1
    speculator.hidden_states.fill_(float("nan"))
    buffers = speculator.input_buffers
    buffers.input_ids.fill_(speculator.vocab_size - 1)
    buffers.positions.fill_(last)
    buffers.seq_lens.fill_(last)
    buffers.query_start_loc.fill_(speculator.max_num_tokens)
    speculator.sample_indices.fill_(speculator.max_num_tokens - 1)
    speculator.sample_pos.fill_(last)
    speculator.sample_idx_mapping.fill_(0)
    speculator.context_positions.fill_(last)
    # A slot that some request's context has.
    page = speculator.block_tables.block_sizes[speculator.draft_kv_cache_group_id]
    speculator._context_slot_mappings.fill_(page)
    for group in speculator.draft_kv_cache_group_ids:
        speculator.block_tables.slot_mappings[group].fill_(page)
    speculator.draft_tokens.fill_(-1)
    aux = getattr(speculator, "_aux_staging", None)
    if aux is not None:
        aux.fill_(float("nan"))


def install(speculator: Any, counts: "Counter[str]", *, graphs: bool) -> None:
    """Puts a loaded engine's speculator on the stand-in; ``counts`` is what its passes count up."""
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.v1.worker.gpu.spec_decode import speculator as base
    from vllm.v1.worker.gpu.spec_decode.dflash import cudagraph

    run = InterpretedFunction.run

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        INTERPRETING.append(True)
        try:
            return run(self, *args, **kwargs)
        finally:
            INTERPRETING.pop()

    InterpretedFunction.run = interpreted
    base.build_attn_metadata = cudagraph.build_attn_metadata = metadata
    attention = DeviceAttention(speculator)
    if graphs:
        _capture(speculator, attention, counts)
    propose, own = speculator.propose, Device(speculator, attention.caches)

    @torch.inference_mode()
    def watched(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        poison(speculator)
        watch = Watch(own, Device(input_batch, args, kwargs))
        with watch, WatchMethods(watch):
            return propose(input_batch, *args, **kwargs)

    speculator.propose = watched


@torch.inference_mode()
def _capture(speculator: Any, attention: DeviceAttention, counts: "Counter[str]") -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu import cudagraph_utils

    class Graph:
        tape: Tape

        def replay(self) -> None:
            self.tape.replay()
            counts.update(self.tape.work)
            counts["replayed"] += self.requests

    @contextmanager
    def record(graph: Graph, pool: Any, stream: Any = None) -> Iterator[None]:
        graph.tape, before = Tape(), counts.copy()
        with graph.tape:
            yield
        graph.tape.work = counts - before
        graph.requests = graph.tape.work["forwarded"] // speculator.num_query_per_req

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, record
    cudagraph_utils.graph_capture = lambda **_: nullcontext()
    cudagraph_utils.capture_pool = lambda *_: nullcontext()
    cudagraph_utils.current_stream = lambda: None
    cudagraph_utils.current_platform.get_global_graph_pool = lambda: None
    compilation = speculator.vllm_config.compilation_config
    compilation.cudagraph_capture_sizes = SIZES
    compilation.max_cudagraph_capture_size = max(SIZES)
    speculator.attn_cg_support = SimpleNamespace(
        min_cg_support=AttentionCGSupport.ALWAYS, min_cg_attn_backend=None
    )
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    known = Device(speculator, attention.caches)
    speculator.capture()
    graphs = speculator.query_cudagraph_manager.graphs
    assert graphs
    for description, graph in graphs.items():
        # One number is what a CPU's matrix product goes by, the address of its packed weights.
        for tensor in (t for t in graph.tape.foreign if t.dim()):
            assert known.holds(tensor), f"{description} reads a tensor that nobody keeps: {tensor}"

"""A stand-in for a GPU under the interpreted V2 runner: draft attention that reads device tensors
only, and buffers that hold what no step may read, on the tapes and watches of ``tapes.py``.

- ``DeviceAttention``: vLLM's CPU attention makes its plan on the host; here are some lines of torch
  over the block table, the sequence lengths and the slots that a GPU's kernels get.
- ``poison``: what the speculator's buffers hold between steps.
- ``install``: puts an engine's speculator on all that.
Limits: one process, greedy drafts.

    pytest tests/engine/test_v2_graphs.py
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from tapes import INTERPRETING, SIZES, Device, Tape, Watch, WatchMethods


class DeviceAttention:
    """The draft layers' KV cache and attention, of device tensors only."""

    def __init__(self, speculator: Any) -> None:
        from vllm.forward_context import get_forward_context

        config = speculator.kv_cache_config
        self.context = get_forward_context
        (self.page,) = {group.kv_cache_spec.block_size for group in config.kv_cache_groups}
        self.slots = config.num_blocks * self.page
        self.caches: dict[str, torch.Tensor] = {}
        for layer in speculator.model.model.layers:
            module = layer.self_attn
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
            each = rows // requests
            # As far as a table reaches: what a sequence's length counts too much is read, too.
            positions = torch.arange(metadata.block_table.shape[1] * self.page)
            slots = (
                metadata.block_table[:, positions // self.page].long() * self.page
                + positions % self.page
            )
            keys, values = cache[0][slots].float(), cache[1][slots].float()
            heads = query.view(requests, each, module.num_kv_heads, -1, module.head_dim).float()
            scores = torch.einsum("rqhgd,rkhd->rhgqk", heads, keys) * module.head_dim**-0.5
            # A kernel takes a request's rows for the last positions of its sequence, whatever
            # positions they were embedded at.
            ends, keys_at = metadata.seq_lens[:, None, None], positions[None, None]
            queries_at = ends - each + torch.arange(each)[:, None]
            seen = keys_at < (torch.minimum(ends, queries_at + 1) if module.causal else ends)
            if module.attn.sliding_window is not None:
                seen = seen & ((keys_at - queries_at).abs() < module.attn.sliding_window)
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
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
    for name in ("_before", "_aux_staging"):
        buffer = getattr(speculator, name, None)
        if buffer is not None:
            buffer.fill_(float("nan"))


def schedule_asynchronously() -> None:
    """As on a GPU: vLLM has a CPU's engines schedule a step when the one before has ended."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def checking(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(checking)


def watch_target(speculator: Any, decodes: list[tuple[int, int, int]]) -> None:
    """Notes of each step in which all requests decode their number, their tokens and for how many
    tokens the target's CUDA graph would be; 0: it has none that is whole."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    # As FlashAttention 3's.
    CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.ALWAYS
    cudagraph_utils.current_platform.get_global_graph_pool = lambda: None
    config = copy.copy(speculator.vllm_config)
    config.speculative_config = speculator.speculative_config
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_capture_sizes = SIZES
    config.compilation_config.max_cudagraph_capture_size = max(SIZES)
    manager = model_runner.ModelCudaGraphManager(
        config,
        speculator.device,
        CUDAGraphMode.FULL_DECODE_ONLY,
        decode_query_len=speculator.num_draft_tokens + 1,
    )
    manager._graphs_captured = True
    dispatch = model_runner.dispatch_cg_and_sync_dp

    def noting(
        _: Any, num_reqs: int, num_tokens: int, uniform: int | None, *args: Any, **named: Any
    ) -> Any:
        longest = named["max_query_len"]
        if longest is not None and not named["need_eager"]:
            found = manager.dispatch(num_reqs, num_tokens, uniform, 0, longest)
            is_whole = found.cg_mode == CUDAGraphMode.FULL
            decodes.append((num_reqs, num_tokens, found.num_tokens if is_whole else 0))
        return dispatch(_, num_reqs, num_tokens, uniform, *args, **named)

    model_runner.dispatch_cg_and_sync_dp = noting


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

"""Parts of a drafting step, each timed alone: what the profile's totals are made of.

On a GPU a part is captured in a CUDA graph of its own and replayed, so launches cost what they cost
in a step; on a CPU it is called.
"""

import time
from collections.abc import Callable
from typing import Any


def pieces(speculator: Any, requests: int, repeats: int) -> dict[str, float | str]:
    """Microseconds of each part for ``requests`` blocks, the context of one verified block each; or
    why it has none. Nothing is changed: keys and values go to slots that no cache has."""
    import torch

    found: dict[str, float | str] = {}
    with torch.inference_mode():
        for name, part in _parts(speculator, requests).items():
            try:
                found[name] = microseconds(part, repeats)
            except Exception as error:  # what cannot be captured: the others can
                found[name] = f"failed: {error}"
    return found


def _parts(speculator: Any, requests: int) -> dict[str, Callable[[], Any]]:
    import torch

    from vllm_dflash.drafting.layout import end_blocks_at

    model, device = speculator.model, speculator.device
    block, samples = speculator.num_query_per_req, speculator.num_draft_tokens
    predicting = len(speculator.sample_pos) // speculator.max_num_reqs
    config, rows = model.drafter_config, requests * block

    def zeros(*shape: int, dtype: Any = torch.int64) -> Any:
        return torch.zeros(*shape, dtype=dtype, device=device)

    features = zeros(rows, config.num_features * config.hidden_size, dtype=speculator.dtype)
    positions, hidden = zeros(rows), zeros(rows, config.hidden_size, dtype=speculator.dtype)
    context = model.combine_hidden_states(features)
    nowhere = torch.full_like(positions, -1)
    moved: dict[str, Any] = dict(
        last_positions=zeros(requests, 1),
        rows=[zeros(requests, block, dtype=torch.int32), zeros(requests, block)],
        slots=[zeros(requests, block)],
        sample_indices=zeros(requests, predicting),
    )
    return {
        "features to context": lambda: model.combine_hidden_states(features),
        "context to keys and values": lambda: model.precompute_and_store_context_kv(
            context, positions, nowhere
        ),
        "blocks moved to max_model_len": lambda: end_blocks_at(speculator.max_model_len, **moved),
        "lm_head and best token": lambda: model.compute_logits(hidden[: requests * samples]).argmax(
            -1
        ),
    }


def microseconds(part: Callable[[], Any], repeats: int) -> float:
    """Of one call, the mean of ``repeats``."""
    import torch

    for _ in range(3):
        part()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(repeats):
            part()
        return 1e6 * (time.perf_counter() - began) / repeats
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(1000 * begin.elapsed_time(end) / repeats)

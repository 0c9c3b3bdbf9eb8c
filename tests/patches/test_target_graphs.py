"""The target's CUDA graphs where drafting is adaptive: for drafts of any lengths and for none,
where its attention can; else, and without our controller, as vLLM has them."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_dflash.patches import v2_target_graphs

from vllm_dflash.adaptive import settings

pytestmark = pytest.mark.vllm
K = 3
BATCHES = {"no drafts": [1] * 4, "cut drafts": [1, 3, 4, 2], "whole drafts": [1 + K] * 4}
Support = tuple[str, int | None]
"""An attention's, and up to how many tokens a request its graphs go besides."""


def config(target: Support, draft: Support = ("ALWAYS", None), adaptive: bool = True) -> Any:
    """A ``VllmConfig`` with two layers of the target's and one of the drafter's."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionCGSupport

    class Layer(AttentionLayerBase):
        def __init__(self, support: Support, is_draft: bool = False) -> None:
            self.is_draft_layer = is_draft
            self.builder = SimpleNamespace(
                get_cudagraph_support=lambda *_: AttentionCGSupport[support[0]],
                get_varlen_cudagraph_max_query_len=lambda *_: support[1],
            )

        def get_attn_backend(self) -> Any:
            return SimpleNamespace(get_builder_cls=lambda: self.builder)

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return object()

    found = copy.copy(VllmConfig())
    found.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8, 16]
    found.compilation_config.max_cudagraph_capture_size = 16
    found.compilation_config.static_forward_context = {
        "first": Layer(("ALWAYS", None)),
        "second": Layer(target),
        "draft": Layer(draft, is_draft=True),
    }
    found.scheduler_config = copy.copy(found.scheduler_config)
    found.scheduler_config.max_num_seqs = 8
    found.scheduler_config.scheduler_cls = settings._ASYNC_SCHEDULER if adaptive else None
    found.speculative_config = SimpleNamespace(
        method="dflash",
        draft_model_config=SimpleNamespace(architectures=["DFlashDraftModel"]),
        num_speculative_tokens=K,
        num_speculative_tokens_per_batch_size=None,
        uses_dynamic_speculative_decoding=lambda: False,
    )
    return found


def graphs(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, **others: Any) -> set[str]:
    """For which batches the manager has a graph of the whole target."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    monkeypatch.setattr(
        cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None)
    )
    make = v2_target_graphs.PATCH.replace(cudagraph_utils.ModelCudaGraphManager)  # type: ignore[misc]
    manager = make(
        vllm_config,
        torch.device("cpu"),
        CUDAGraphMode.FULL_AND_PIECEWISE,
        decode_query_len=1 + K,
        **others,
    )
    manager._graphs_captured = True
    found = set()
    for name, lengths in BATCHES.items():
        uniform = lengths[0] if len(set(lengths)) == 1 else None
        batch = manager.dispatch(len(lengths), sum(lengths), uniform, 0, max(lengths))
        if batch.cg_mode == CUDAGraphMode.FULL:
            found.add(name)
        # A batch with a prompt has none in any case.
        prompt = manager.dispatch(len(lengths), sum(lengths), None, 0, None)
        assert prompt.cg_mode == CUDAGraphMode.PIECEWISE
    return found


@pytest.mark.parametrize("target", [("ALWAYS", None), ("UNIFORM_BATCH", 1 + K)])
def test_steps_of_all_lengths_have_a_graph(
    monkeypatch: pytest.MonkeyPatch, target: Support
) -> None:
    """Whatever the drafter's attention can."""
    assert graphs(config(target, ("NEVER", None)), monkeypatch) == BATCHES.keys()


@pytest.mark.parametrize(
    "target", [("UNIFORM_BATCH", None), ("UNIFORM_BATCH", K), ("NEVER", 1 + K)]
)
def test_an_attention_that_cannot(monkeypatch: pytest.MonkeyPatch, target: Support) -> None:
    assert graphs(config(target), monkeypatch) == {"whole drafts"}


def test_without_the_controller_they_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = config(("ALWAYS", None), adaptive=False)
    assert graphs(plain, monkeypatch) == {"whole drafts"}
    assert graphs(plain, monkeypatch, varlen_decode=True) == BATCHES.keys()


def test_what_cannot_be_asked_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = config(("ALWAYS", None))
    broken.compilation_config.static_forward_context["second"].get_attn_backend = None
    assert graphs(broken, monkeypatch) == {"whole drafts"}
    assert "CUDA graphs are for whole drafts alone" in caplog.text

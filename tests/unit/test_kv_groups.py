"""Which KV cache groups the draft layers come into: what a runner cannot serve is refused by name,
with what to do. vLLM's own is an assertion."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.errors import DrafterConfigError

pytestmark = pytest.mark.vllm


def cache(*groups: list[str]) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=names) for names in groups])


def test_draft_layers_in_several_groups_are_refused_on_v1() -> None:
    """As vLLM's hybrid KV cache manager makes of a drafter with sliding and full layers."""
    from vllm_dflash.drafting.v1 import DFlashProposer

    proposer = DFlashProposer.__new__(DFlashProposer)
    proposer._draft_attn_layer_names = {"draft.0", "draft.1"}
    proposer.context = SimpleNamespace(may_wait=True)
    proposer.validate_same_kv_cache_group(cache(["target.0"], ["target.1", "draft.0", "draft.1"]))
    with pytest.raises(DrafterConfigError, match=r"several KV cache groups.*--disable-hybrid"):
        proposer.validate_same_kv_cache_group(cache(["target.0", "draft.0"], ["draft.1"]))


@pytest.mark.parametrize(
    ("groups", "may_wait"),
    [([["target.0", "draft.0"]], True), ([["target.0"], ["draft.0"]], False)],
)
def test_features_wait_only_where_their_pages_are_nobody_elses(
    groups: list[list[str]], may_wait: bool
) -> None:
    """vLLM's KV cache groups share their memory: what waited was written into pages that a target's
    layers had meanwhile, and the text was wrong (a sliding target with the prefix cache)."""
    from vllm_dflash.drafting.v1 import DFlashProposer

    proposer = DFlashProposer.__new__(DFlashProposer)
    proposer._draft_attn_layer_names = {"draft.0"}
    proposer.context = SimpleNamespace(may_wait=True)
    proposer.validate_same_kv_cache_group(cache(*groups))
    assert proposer.context.may_wait is may_wait


def test_layers_that_differ_in_causality_in_one_group_are_refused_on_v2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_dflash.drafting.v2 import DFlashSpeculator

    base = DFlashSpeculator.__mro__[1]
    monkeypatch.setattr(base, "set_attn", lambda self: None)
    speculator = DFlashSpeculator.__new__(DFlashSpeculator)
    names, causal = ["draft.0", "draft.1"], [True, False]
    speculator.model = SimpleNamespace(
        get_draft_kv_cache_layer_names=lambda: names, get_draft_attn_causal=lambda: causal
    )
    speculator.kv_cache_config = cache(["target.0", "draft.0"], ["draft.1"])
    speculator.set_attn()
    speculator.kv_cache_config = cache(["target.0"], names)
    with pytest.raises(DrafterConfigError, match=r"one KV cache group: start vLLM without"):
        speculator.set_attn()

"""The context that the drafter attends to is whole, whatever happens to a request: preemption,
steps that draft nothing, a KV connector.

And a step that ran without the drafter leaves a hole, which is found, counted, and never attended
to.

pytest tests/engine/test_context_integrity.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.harness import Batch, Job, run_engines
from engine.oracle import compare_drafts
from pairs import random_prompts
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import draft_block, target_features

pytestmark = pytest.mark.engine

PAGE = 128
"""Tokens in a page of the CPU's KV cache."""
SKIPPED = (40, 45)


@pytest.fixture(scope="module")
def batches(random_target: Path, random_drafter: Path) -> list[Batch]:
    """An engine whose first request has a hole, one that starts with the same page next, and the
    two without skipped steps."""
    first = random_prompts(1, 512)[0][:20]
    plain = Job(random_target, None, [first], max_tokens=200)
    whole = first + run_engines([plain])[0][0].tokens[0]
    skipping = Job(
        random_target,
        random_drafter,
        [first, whole[:150] + [7] * 4],
        max_tokens=200,
        batch_sizes=(1,),
        record=True,
        skip_steps=SKIPPED,
    )
    sound = Job(
        random_target,
        random_drafter,
        skipping.prompts,
        max_tokens=200,
        batch_sizes=(1,),
        record=True,
    )
    plain = Job(random_target, None, skipping.prompts, max_tokens=200, batch_sizes=(1,))
    return [batch[0] for batch in run_engines([skipping, sound, plain])]


def test_every_position_is_covered_where_no_step_is_skipped(
    batches: list[Batch], random_target: Path, random_drafter: Path
) -> None:
    sound = batches[1]
    assert sound.coverage["missing"] == 0
    assert sound.coverage["reused"] == PAGE, (
        "the second request takes one page from the prefix cache"
    )
    assert compare_drafts(sound, random_target, random_drafter, torch.float32, 7).differences == []


def test_holes_are_counted_and_the_output_stays(batches: list[Batch]) -> None:
    skipping, _, plain = batches
    assert skipping.coverage["missing"] >= SKIPPED[1] - SKIPPED[0]
    assert skipping.tokens == plain.tokens


@torch.inference_mode()
def test_holes_are_never_attended_to(
    batches: list[Batch], random_target: Path, random_drafter: Path
) -> None:
    """Drafts equal the reference's over what is left: zeros in the hole while the anchor is in its
    page, then the pages after it.

    The request that finds the page in the prefix cache has the same hole and drafts from the page
    after it.
    """
    batch = batches[0]
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(random_target),
        load_drafter(random_drafter, torch.float32),
    )
    compared = {"in its page": 0, "past its page": 0, "from the prefix cache": 0}
    first = min(d["request"] for _, d in batch.drafts)
    hole = skipped_positions(batch, first)
    contexts = {}
    for sequence, draft in batch.drafts:
        if draft["draft"] == [0] * 7:
            continue  # a skipped step
        if tuple(sequence) not in contexts:
            features, _ = target_features(
                target, drafter.config.target_layer_ids, torch.tensor([sequence]), use_cache=False
            )
            contexts[tuple(sequence)] = drafter.context_kv(
                drafter.context(features), torch.arange(len(sequence))[None]
            )
        n, reused = draft["anchor"], draft["request"] > first
        context = [
            (key[:, :n].clone(), value[:, :n].clone()) for key, value in contexts[tuple(sequence)]
        ]
        gone = [p for p in range(*hole) if p < n]
        for key, value in context:
            key[:, gone], value[:, gone] = 0, 0
        if gone and n // PAGE > 0:
            context = [(key[:, PAGE:], value[:, PAGE:]) for key, value in context]
        expected = draft_block(target, drafter, sequence[n], n, context, 8)
        assert draft["draft"] == expected.tokens, (n, reused, hole)
        where = (
            "from the prefix cache" if reused else "past its page" if n >= PAGE else "in its page"
        )
        compared[where] += bool(gone)
    assert min(compared.values()) > 20, compared


def skipped_positions(batch: Batch, first: int) -> tuple[int, int]:
    """What the first request's skipped steps computed: a step computes what lies between the last
    step's anchor and its own."""
    anchors = [draft["anchor"] for _, draft in batch.drafts if draft["request"] == first]
    return anchors[SKIPPED[0] - 1], anchors[SKIPPED[1] - 1]


LIMIT, FEWER_FROM = 180, 4
"""Requests end at ``max_model_len`` one by one, as their prompts differ in length. Steps of this
many requests or more draft nothing."""


@pytest.fixture(scope="module")
def shaken(
    random_target: Path, random_drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Batch]:
    """Engines in which something happens to the requests, and under ``plain`` one without a
    drafter."""
    prompts = [p + [9] * 60 for p in random_prompts(8, 512)]
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    store = connector | {
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path_factory.mktemp("kv"))}
    }
    long = [p * 3 for p in prompts[:3]]
    common: dict[str, Any] = {"max_tokens": 100, "record": True}
    schedule = [[1, FEWER_FROM - 1, 7], [FEWER_FROM, 16, 0]]
    jobs = {
        "preemption": Job(
            random_target,
            random_drafter,
            prompts,
            engine_args={"num_gpu_blocks_override": 6},
            **common,
        ),
        "nothing drafted": Job(
            random_target,
            random_drafter,
            prompts,
            max_model_len=LIMIT,
            **common | {"max_tokens": LIMIT},
            speculative_config={"num_speculative_tokens_per_batch_size": schedule},
        ),
        "nothing drafted, no prefix cache": Job(
            random_target,
            random_drafter,
            prompts,
            max_model_len=LIMIT,
            engine_args={"enable_prefix_caching": False},
            **common | {"max_tokens": LIMIT},
            speculative_config={"num_speculative_tokens_per_batch_size": schedule},
        ),
        "plain up to the limit": Job(
            random_target, None, prompts, max_model_len=LIMIT, max_tokens=LIMIT
        ),
        "stored": Job(
            random_target,
            random_drafter,
            long,
            engine_args={"kv_transfer_config": store},
            **common | {"max_tokens": 20},
        ),
        "loaded": Job(
            random_target,
            random_drafter,
            long,
            engine_args={"kv_transfer_config": store},
            **common | {"max_tokens": 20},
        ),
        "plain": Job(random_target, None, prompts, max_tokens=100),
    }
    return dict(zip(jobs, (b[0] for b in run_engines(list(jobs.values()))), strict=True))


def check_whole(
    batch: Batch, target: Path, drafter: Path, at_least: int, max_model_len: int | None = None
) -> None:
    assert batch.coverage["missing"] == 0
    agreement = compare_drafts(batch, target, drafter, torch.float32, 7, max_model_len)
    assert agreement.tokens >= 7 * at_least
    assert agreement.differences == []


def test_preemption_and_resumption(
    shaken: dict[str, Batch], random_target: Path, random_drafter: Path
) -> None:
    batch = shaken["preemption"]
    assert batch.report["counters"]["preemptions"] > 0
    assert batch.tokens == shaken["plain"].tokens
    check_whole(batch, random_target, random_drafter, 600)


@pytest.mark.parametrize("name", ["nothing drafted", "nothing drafted, no prefix cache"])
def test_steps_that_draft_nothing(
    shaken: dict[str, Batch], random_target: Path, random_drafter: Path, name: str
) -> None:
    """Their context is written all the same, so that the drafts of the last requests, when few are
    left, are whole.

    Without a prefix cache only those requests' own: what ended before is dropped.
    """
    batch = shaken[name]
    assert batch.tokens == shaken["plain up to the limit"].tokens
    assert sum(draft["draft"] == [] for _, draft in batch.drafts) > 200
    check_whole(batch, random_target, random_drafter, 20, LIMIT)


def test_context_from_a_kv_connector(
    shaken: dict[str, Batch], random_target: Path, random_drafter: Path
) -> None:
    """Pages that another engine has stored: the draft layers' come with the target's."""
    stored, loaded = shaken["stored"], shaken["loaded"]
    assert stored.coverage["reused"] == 0
    assert loaded.coverage["reused"] >= 3 * PAGE
    assert loaded.tokens == stored.tokens
    check_whole(loaded, random_target, random_drafter, 50)

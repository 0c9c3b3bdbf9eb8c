"""DFlare and the other shapes of drafters in vLLM's V2 model runner, on a CPU, against the plain
PyTorch reference and the V1 runner.

One process of V2 engines and, beside it, one of V1 engines, all on the same prompts: some are
prefilled in chunks, and every second one ends at ``max_model_len``.

    pytest tests/engine/test_v2_formats.py
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine import harness
from engine.rounding import AT_LEAST
from engine.v2_jobs import Job, run_engines
from engine.v2_runs import Runs
from pairs import make_random_drafter, random_drafter_config, random_prompts
from variants import VARIANTS

# Longer than the engines' own limit, so that a hang is reported with what they wrote.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

K = 7
MAX_MODEL_LEN = 128
PAGE = 32
"""Tokens in a page of the KV cache: a window of 24 leaves pages behind, which are freed and taken
by others."""
NAMES = (
    "dflash",
    "dflare",
    "dflare mixed",
    "dflare speculators",
    "dflash mixed causal",
    "dflash sliding",
    "dflash own tables",
    "dflash2 convolution",
    "dspark",
    "dflare candidates",
    "dflare markov",
    "dflash yarn",
    "lilicorr convolution",
    "dflare lattice",
    "dfly",
)
SLIDING = ("dflare mixed", "dflash mixed causal", "dflash sliding")
ON_BOTH_RUNNERS = ("dflash", "dflare")
BFLOAT16 = len(NAMES) + 1
"""The jobs: plain decoding, one a name, and a dflare drafter in bfloat16."""


@pytest.fixture(scope="module")
def both(
    random_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runs, dict[str, harness.Batch]]:
    """The V2 engines' runs, and what the V1 engines did on the same prompts."""
    folder = tmp_path_factory.mktemp("variants")
    drafters = {name: VARIANTS[name].make(folder / name.replace(" ", "-")) for name in NAMES}
    random = Random(1)
    prompts = [
        [random.randrange(2, 500) for _ in range(length)]
        for length in (3, 110, 40, 113, 71, 119, 1, 108)
    ]
    shared: dict[str, Any] = dict(
        target=str(random_target),
        prompts=prompts,
        max_tokens=20,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=192,
        max_num_seqs=8,
        engine_args={"block_size": PAGE},
    )
    jobs = [
        Job(**shared),
        *(
            Job(
                **shared,
                drafter=str(drafter),
                script_from=0,
                num_speculative_tokens=VARIANTS[name].tokens,
            )
            for name, drafter in drafters.items()
        ),
    ]
    # Another drafter and more prompts: of the first, whose sequences repeat, the two best logits
    # tie in one token of forty.
    another = make_random_drafter(
        folder / "another", config=random_drafter_config(**VARIANTS["dflare"].changes), seed=2
    )
    jobs.append(
        Job(
            **shared
            | dict(
                drafter=str(another),
                dtype="bfloat16",
                prompts=random_prompts(16, 512),
                max_num_seqs=16,
            )
        )
    )
    v1_jobs = [
        harness.Job(
            random_target,
            drafters[name],
            prompts,
            max_tokens=20,
            max_model_len=MAX_MODEL_LEN,
            record=True,
            engine_args={"block_size": PAGE},
        )
        for name in ON_BOTH_RUNNERS
    ]
    with ThreadPoolExecutor() as pool:
        v1 = pool.submit(harness.run_engines, v1_jobs)
        runs = Runs(jobs, run_engines(jobs))
        return runs, {
            name: batches[0] for name, batches in zip(ON_BOTH_RUNNERS, v1.result(), strict=True)
        }


@pytest.fixture(scope="module")
def runs(both: tuple[Runs, dict[str, harness.Batch]]) -> Runs:
    return both[0]


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_the_references(runs: Runs, name: str) -> None:
    """Scripted acceptance in half of the requests, so that steps commit 1 to K + 1 tokens; output
    as without a drafter."""
    run = 1 + NAMES.index(name)
    assert len(runs.compare(run)) >= 70
    assert runs.differences(run) == []
    assert runs.results[run].outputs == runs.results[0].outputs


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_drafts_near_max_model_len(runs: Runs, name: str) -> None:
    """A block reached past ``max_model_len``, its sequence was cut there, and attention counts a
    window and a causal mask from the sequence's end: for every query they were off by what was cut.
    Only drafts of the last K positions were wrong.
    """
    assert (
        runs.differences(
            1 + NAMES.index(name), lambda prompt, draft: draft.anchor + K >= MAX_MODEL_LEN
        )
        == []
    )


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_have_a_cache_of_their_own(runs: Runs, name: str) -> None:
    """Groups of their own for sliding layers: pages that a window has left are freed. Drafts stay
    right after that."""
    run = 1 + NAMES.index(name)
    assert runs.results[run].kv_cache_groups > 1
    assert runs.differences(run, lambda prompt, draft: draft.anchor >= 24 + PAGE) == []


def test_dflare_after_a_chunk_of_the_prompt(runs: Runs) -> None:
    assert (
        runs.differences(
            1 + NAMES.index("dflare"), lambda prompt, draft: draft.anchor < len(prompt)
        )
        == []
    )


def test_bfloat16_dflare_drafts_are_the_references(runs: Runs) -> None:
    pairs = [pair for draft in runs.compare(BFLOAT16) for pair in draft]
    agreeing = sum(pair.served == pair.reference for pair in pairs) / len(pairs)
    print(f"\nV2, bfloat16, random dflare: {agreeing:.4f} of {len(pairs)} tokens agree")
    assert agreeing >= AT_LEAST
    assert sum(pair.differs_beyond_rounding for pair in pairs) <= 0.01 * len(pairs)


@pytest.mark.parametrize("name", ON_BOTH_RUNNERS)
def test_v1_and_v2_draft_the_same(both: tuple[Runs, dict[str, harness.Batch]], name: str) -> None:
    """At the same anchors of the same sequences the two runners draft the same tokens."""
    runs, batch = both[0], both[1][name]
    run = 1 + NAMES.index(name)
    assert batch.tokens == runs.results[run].outputs
    v1 = {(tuple(tokens), draft["anchor"]): draft["draft"] for tokens, draft in batch.drafts}
    compared = 0
    for _, tokens, drafts in runs.drafts(run):
        for draft in drafts:
            if (tuple(tokens), draft.anchor) in v1:
                # Tokens for positions that do not exist are never scheduled.
                room = MAX_MODEL_LEN - 1 - draft.anchor
                assert draft.tokens[:room] == v1[tuple(tokens), draft.anchor][:room]
                compared += min(K, room)
    assert compared >= 300


def test_the_variants_differ(runs: Runs) -> None:
    """No two checkpoints draft alike: what a setting changes is not tested where it changes
    nothing."""
    drafted = [
        str([[draft.tokens for draft in drafts] for drafts in runs.results[1 + i].drafts])
        for i in range(len(NAMES))
    ]
    assert len(set(drafted)) == len(NAMES)

"""The V2 speculator as a GPU runs it, without one: no wait of the host, nothing read of the step
before, and CUDA graphs as tapes (``fake_device.py``, ``tapes.py``).

One process, which schedules asynchronously; its drafter's block is 8 and K is 3. Seven requests,
for which there is a graph, draft nothing, nor do more than ``DRAFT_AT_MOST``, so that graphs,
padding and steps with K = 0 alternate.
Some prompts are longer than a graph's context rows, some requests end at ``max_model_len``: with a
causal mask and windows, which the drafter has beside full attention, a block that is not moved
there drafts otherwise.

    pytest tests/engine/test_v2_graphs.py
"""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.tapes import SIZES
from engine.v2_jobs import Job, Request, Work, run_engines
from engine.v2_runs import Runs
from variants import VARIANTS

# Longer than the engines' own limit, so that a hang is reported with what they wrote.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

K, BLOCK = 3, 8
DRAFT_AT_MOST = 8
MAX_MODEL_LEN, PAGE = 128, 32
PLAIN, WATCHED, GRAPHS, FITTED = range(4)
"""The jobs; the last one's ``max_model_len`` is what its KV cache has room for, its drafter has a
head over the whole block, vLLM decides what is accepted, by a rate for each of K tokens, and
nothing says whether drafting is adaptive."""


@pytest.fixture(scope="module")
def runs(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("pair")
    drafter = str(VARIANTS["dflash mixed causal"].make(folder / "drafter"))
    random = Random(3)
    lengths = [3, 40, 112, 1, 70, 5, 20, 112, 30]
    prompts = [[random.randrange(2, 500) for _ in range(length)] for length in lengths]
    shared: dict[str, Any] = dict(
        target=str(random_target),
        prompts=prompts,
        max_tokens=16,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=160,
        max_num_seqs=len(prompts),
        # Five at once, then all nine, then fewer and fewer.
        requests={i: Request(dict(max_tokens=10 + i), arrives=6) for i in range(5, len(prompts))}
        | {0: Request(dict(max_tokens=30)), 1: Request(dict(max_tokens=24))},
        engine_args={"block_size": PAGE},
    )
    speculative: dict[str, Any] = shared | dict(
        drafter=drafter,
        num_speculative_tokens=K,
        script_from=PLAIN,
        speculative_config={
            "num_speculative_tokens_per_batch_size": [
                [1, 6, K],
                [7, 7, 0],
                [DRAFT_AT_MOST, DRAFT_AT_MOST, K],
                [DRAFT_AT_MOST + 1, len(prompts), 0],
            ]
        },
    )
    # Of the target's five layers and the drafter's three: keys and values of two heads of 32
    # elements, float32.
    page_bytes = 8 * PAGE * 2 * 2 * 32 * 4
    jobs = [
        Job(**shared),
        Job(**speculative, device="watched"),
        Job(**speculative, device="graphs", measured=True),
        Job(
            **speculative
            | dict(
                adaptive=None,
                drafter=str(VARIANTS["dflare lattice"].make(folder / "lattice")),
                prompts=[prompts[1], prompts[4]],
                max_tokens=70,
                requests={},
                max_model_len=-1,
                script_from=None,
                device="graphs",
                speculative_config={
                    "rejection_sample_method": "synthetic",
                    "synthetic_acceptance_length": 1.5,
                },
                engine_args={"block_size": PAGE, "kv_cache_memory_bytes": 4 * page_bytes},
            )
        ),
    ]
    return Runs(jobs, run_engines(jobs))


def drafting(runs: Runs, run: int) -> list[Work]:
    return [work for work in runs.results[run].work if work.k]


@pytest.mark.parametrize("run", [WATCHED, GRAPHS, FITTED])
def test_drafts_are_the_references(runs: Runs, run: int) -> None:
    """Without a wait of the host, with buffers that hold what must not be read, by graphs whose
    control flow stands still. A head over the block drafts by all of its rows where K is less."""
    assert len(runs.compare(run)) >= 50
    assert runs.differences(run) == []
    if run != FITTED:
        assert runs.results[run].outputs == runs.results[PLAIN].outputs


@pytest.mark.parametrize("run", [WATCHED, GRAPHS])
def test_a_block_is_moved_where_its_step_needs_it(runs: Runs, run: int) -> None:
    """No block of a step that is captured reaches past ``max_model_len``: what Python decides then
    stands still, and in a replay no block would be moved any more."""
    moved = {
        draft.step
        for _, _, drafts in runs.drafts(run)
        for draft in drafts
        if draft.anchor + BLOCK > MAX_MODEL_LEN
    }
    replayed = {step for step, work in enumerate(runs.results[run].work, 1) if work.replayed}
    assert len(moved) >= 2
    assert run == WATCHED or moved <= replayed
    assert runs.differences(run, lambda _, draft: draft.anchor + BLOCK > MAX_MODEL_LEN) == []


def test_graphs_draft_what_runs_without_them_draft(runs: Runs) -> None:
    assert runs.results[GRAPHS].drafts == runs.results[WATCHED].drafts


@pytest.mark.parametrize("run", [WATCHED, GRAPHS])
def test_a_step_with_k_0_runs_no_query(runs: Runs, run: int) -> None:
    """On vLLM 0.32 it drafted the block, and the model runner dropped it."""
    undrafted = [work for work in runs.results[run].work if not work.k]
    assert len(undrafted) >= 5
    assert {(work.forwarded, work.ranked) for work in undrafted} == {(0, 0)}
    assert {work.k for work in runs.results[run].work[-3:]} == {K}, "drafted again later"


@pytest.mark.parametrize("run", [WATCHED, GRAPHS])
def test_lm_head_has_k_rows_a_request(runs: Runs, run: int) -> None:
    """All of a block's rows that predict went through it, and what was past K was dropped."""
    for work in drafting(runs, run):
        num_reqs = work.replayed or work.num_reqs
        assert (work.forwarded, work.ranked) == (BLOCK * num_reqs, K * num_reqs)


def test_adaptive_verification_gets_k_confidences_a_request(runs: Runs) -> None:
    """vLLM keeps them in a buffer of K a request: those of all rows ended the engine. The rest of
    it needs a GPU."""
    assert runs.results[WATCHED].confidences == [len(runs.jobs[WATCHED].prompts), K]


def test_what_was_measured_is_read_by_nobody(runs: Runs) -> None:
    """The warm-up's requests wrote into the pages that the first ones got, and left the buffers
    as they were: ``test_drafts_are_the_references`` and the others look at the steps after."""
    assert runs.results[GRAPHS].cells >= 3


def test_every_drafting_step_has_a_graph(runs: Runs) -> None:
    """For all request counts for which the target's verification has one: vLLM's own end at
    ``SIZES`` tokens, with a block of 8 at 4 requests, and with a schedule by batch size there were
    none for a block that is longer than K + 1."""
    steps = {(work.num_reqs, work.replayed) for work in drafting(runs, GRAPHS)}
    counts = {num_reqs for num_reqs, _ in steps}
    assert len(counts) >= 3
    assert max(counts) > max(SIZES) // BLOCK
    for num_reqs, replayed in steps:
        assert replayed >= num_reqs
    assert any(replayed > num_reqs for num_reqs, replayed in steps), "no graph was padded"
    assert {work.replayed for work in drafting(runs, WATCHED)} == {0}


def test_attention_plans_for_the_largest_graph(runs: Runs) -> None:
    """FlashAttention holds its splits still up to the target's largest graph only, unless it is
    told of a larger one."""
    largest = BLOCK * max(work.replayed for work in drafting(runs, GRAPHS))
    assert max(SIZES) < largest <= runs.results[GRAPHS].attention_rows


@pytest.mark.parametrize("run", [WATCHED, GRAPHS, FITTED])
def test_the_target_keeps_its_graphs(runs: Runs, run: int) -> None:
    """vLLM has them for K + 1 tokens a request, and for what a schedule by batch size says. Drafts
    that were cut by request, or steps that draft nothing without a schedule, had none. The engine
    left to itself was not measured, and so cuts none; later on requests end, and verify less."""
    result = runs.results[run]
    assert (result.profile, result.adapts) == (None, False)
    assert result.is_asynchronous
    assert len(result.decodes) >= 15
    assert [decode for decode in result.decodes[:12] if not decode[2]] == [], result.decodes


def test_a_length_that_was_fitted_to_the_cache(runs: Runs) -> None:
    """``--max-model-len -1``: vLLM lowers it after the speculator was made, which kept the old one
    and moved no block that reached past the new one."""
    result = runs.results[FITTED]
    assert PAGE < result.max_model_len < 4 * PAGE + 1
    assert (
        max(len(p) + len(o) for p, o in zip(result.prompts, result.outputs, strict=True))
        == result.max_model_len
    )
    assert (
        runs.differences(FITTED, lambda prompt, draft: draft.anchor + BLOCK > result.max_model_len)
        == []
    )

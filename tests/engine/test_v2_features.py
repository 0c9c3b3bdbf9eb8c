"""vLLM's features beside our drafter in the V2 model runner, on a CPU: the output is plain
decoding's, the drafts are the reference's.

A position for which no draft K/V was written, or another request's K/V, changes a random drafter's
drafts, so that the plain PyTorch reference finds it. One process; each engine's requests are listed
with it.
Not tested here, for the interpreter has none of it: asynchronous scheduling, tensor parallelism,
LoRA; CUDA graphs are ``test_v2_graphs.py``'s.

    pytest tests/engine/test_v2_features.py
"""

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts
from engine.v2_jobs import Job, Request, run_engines
from engine.v2_runs import Runs
from variants import VARIANTS

# Longer than the engines' own limit, so that a hang is reported with what they wrote.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

K = 7
MAX_MODEL_LEN = 128
PAGE = 32
"""Tokens in a page of the KV cache."""
PLAIN, DFLASH, SLIDING, PLAIN_LONG, TIGHT, TIGHT_SLIDING, ZERO, PLAIN_TEXT, TEXT = range(9)
"""The jobs: many features at once; a KV cache too small for the requests, the first of them with
``use_local_argmax_reduction``; steps with K = 0; structured output, and requests that limit their
drafts. SLIDING's drafter is DFlare with a full and two sliding layers, which have KV cache groups
of their own."""
(
    GREEDY,
    COLD,
    SEVERAL,
    LATE,
    LONG,
    SEEDED,
    PENALISED,
    LAST,
    ABORTED,
    SEEDED_AGAIN,
    NEW,
    WARM,
    WARM_SCRIPTED,
    TURN,
    LONG_TURN,
) = range(15)
"""The prompts of the first three jobs; the even ones accept scripted drafts."""
OFF, AT_MOST_TWO = 2, 3
"""Prompts of the last two jobs: their requests say how much is drafted."""
DRAFT_AT_MOST = 2
"""In job ZERO, steps of more requests draft nothing."""


def _many(target: str, random: Random) -> dict[str, Any]:
    lengths = {
        GREEDY: 100,
        COLD: 70,
        SEVERAL: 40,
        LATE: 1,
        LONG: 20,
        SEEDED: 60,
        PENALISED: 12,
        LAST: 115,
        ABORTED: 50,
        TURN: 5,
        LONG_TURN: 9,
    }
    made = {i: [random.randrange(2, 500) for _ in range(length)] for i, length in lengths.items()}
    made |= {
        SEEDED_AGAIN: made[SEEDED],
        NEW: made[PENALISED],
        WARM: made[COLD],
        WARM_SCRIPTED: made[GREEDY],
    }
    seeded = dict(temperature=0.8, seed=5)
    requests = {
        SEVERAL: Request(dict(temperature=1.0, seed=7, n=2)),
        LATE: Request(arrives=4),
        LONG: Request(dict(max_tokens=90, logprobs=3)),
        SEEDED: Request(seeded),
        PENALISED: Request(
            dict(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5)
        ),
        LAST: Request(dict(max_tokens=50)),
        ABORTED: Request(aborted=8),
        SEEDED_AGAIN: Request(seeded, wave=1),
        NEW: Request(arrives=8),
        WARM: Request(wave=1),
        WARM_SCRIPTED: Request(wave=1),
        TURN: Request(wave=1, follows=GREEDY),
        LONG_TURN: Request(wave=1, follows=LONG),
    }
    return dict(
        target=target,
        prompts=[made[i] for i in range(len(made))],
        requests=requests,
        max_tokens=14,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=160,
        max_num_seqs=12,
        engine_args=dict(block_size=PAGE, enable_prefix_caching=True),
    )


@pytest.fixture(scope="module")
def runs(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, random = tmp_path_factory.mktemp("features"), Random(2)
    dflash, sliding = (
        str(VARIANTS[name].make(folder / name)) for name in ("dflash", "dflare mixed")
    )
    many = _many(str(random_target), random)
    prompts = [
        [random.randrange(2, 500) for _ in range(length)] for length in (60, 50, 40, 30, 7, 9)
    ]
    long = {
        3: Request(dict(max_tokens=12)),
        2: Request(dict(max_tokens=16)),
        4: Request(wave=1, follows=3),
        5: Request(wave=1),
    }
    shared: dict[str, Any] = dict(
        target=str(random_target),
        prompts=prompts,
        requests=long,
        max_tokens=40,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )
    # A page of the target's five layers and the drafter's three: keys and values of two heads of 32
    # elements, float32.
    page_bytes = 8 * PAGE * 2 * 2 * 32 * 4
    cached = dict(block_size=PAGE, enable_prefix_caching=True)
    speculative = dict(drafter=sliding, script_from=PLAIN_LONG)
    schedule = {
        "num_speculative_tokens_per_batch_size": [[1, DRAFT_AT_MOST, K], [DRAFT_AT_MOST + 1, 4, 0]]
    }
    text: dict[str, Any] = dict(
        target=str(TARGET),
        prompts=held_out_prompts(4),
        max_tokens=24,
        max_num_seqs=4,
        engine_args={"skip_tokenizer_init": False},
        requests={
            i: Request(dict(structured_outputs=form, detokenize=True, ignore_eos=False))
            for i, form in enumerate(
                [{"regex": r"[a-z]{3}( [a-z]{4})+\."}, {"choice": ["return None", "return self"]}]
            )
        }
        | {
            i: Request(dict(extra_args={"dflash": said}))
            for i, said in ((OFF, {"draft": False}), (AT_MOST_TWO, {"max_draft": 2}))
        },
    )
    jobs = [
        Job(**many),
        Job(**many, drafter=dflash, script_from=PLAIN),
        # By default vLLM keeps a sliding layer's pages at a prompt's end only, and a hit is as long
        # as the shortest group's.
        Job(
            **many | dict(engine_args=cached | dict(prefix_cache_retention_interval=PAGE)),
            drafter=sliding,
            script_from=PLAIN,
        ),
        Job(**shared, engine_args=cached),
        Job(
            **shared | speculative | dict(drafter=dflash),
            engine_args=dict(block_size=PAGE, kv_cache_memory_bytes=8 * page_bytes),
            speculative_config={"use_local_argmax_reduction": True},
        ),
        Job(
            **shared, **speculative, engine_args=cached | dict(kv_cache_memory_bytes=6 * page_bytes)
        ),
        Job(**shared, **speculative, engine_args=cached, speculative_config=schedule),
        Job(**text),
        Job(**text, drafter=str(DRAFTER)),
    ]
    return Runs(jobs, run_engines(jobs))


both = pytest.mark.parametrize("run", [DFLASH, SLIDING])
tight = pytest.mark.parametrize("run", [TIGHT, TIGHT_SLIDING])


@pytest.mark.parametrize("run", [DFLASH, SLIDING, TIGHT, TIGHT_SLIDING, ZERO])
def test_every_draft_is_the_references(runs: Runs, run: int) -> None:
    assert len(runs.compare(run)) >= 60
    assert runs.differences(run) == []


@pytest.mark.parametrize(
    ("run", "plain"),
    [
        (DFLASH, PLAIN),
        (SLIDING, PLAIN),
        (TIGHT, PLAIN_LONG),
        (TIGHT_SLIDING, PLAIN_LONG),
        (ZERO, PLAIN_LONG),
    ],
)
def test_greedy_output_is_plain_decodings(runs: Runs, run: int, plain: int) -> None:
    ours, expected = runs.results[run].outputs, runs.results[plain].outputs
    sampled = {SEVERAL, SEEDED, SEEDED_AGAIN} if plain == PLAIN else set()
    assert [o for i, o in enumerate(ours) if i not in sampled] == [
        o for i, o in enumerate(expected) if i not in sampled
    ]


@both
def test_prefix_caching(runs: Runs, run: int) -> None:
    """A prompt that the cache holds drafts, at every anchor, what it drafted when it was new: the
    draft layers' pages are kept."""
    assert runs.results[run].cached_tokens[COLD] == 0
    assert min(runs.results[run].cached_tokens[i] for i in (WARM, WARM_SCRIPTED, TURN)) >= PAGE
    cold, warm = ({d.anchor: d.tokens for d in runs.results[run].drafts[i]} for i in (COLD, WARM))
    generated = [anchor for anchor in cold if anchor >= len(runs.results[run].prompts[COLD])]
    assert len(generated) >= 10
    assert [cold[anchor] for anchor in generated] == [warm[anchor] for anchor in generated]
    assert runs.differences(run, only=[WARM, WARM_SCRIPTED, TURN]) == []


@both
def test_prefix_caching_of_generated_tokens(runs: Runs, run: int) -> None:
    """The next turn of a conversation finds pages that were filled while drafts were accepted and
    rejected."""
    assert runs.results[run].cached_tokens[LONG_TURN] > len(runs.results[run].prompts[LONG])
    assert runs.differences(run, only=[LONG_TURN]) == []


@both
def test_chunked_prefill(runs: Runs, run: int) -> None:
    """The last token of a prompt's chunk has an anchor too, the prompt's next token."""
    assert runs.differences(run, lambda prompt, draft: draft.anchor < len(prompt)) == []


@both
def test_last_tokens_before_max_model_len(runs: Runs, run: int) -> None:
    """A request that fills ``max_model_len``, in a batch with shorter ones."""
    assert (
        len(runs.results[run].prompts[LAST]) + len(runs.results[run].outputs[LAST]) == MAX_MODEL_LEN
    )
    assert (
        runs.differences(
            run, lambda prompt, draft: draft.anchor + K >= MAX_MODEL_LEN, only=[LAST, TURN]
        )
        == []
    )


@both
def test_one_token_prompt_beside_running_requests(runs: Runs, run: int) -> None:
    """vLLM pads such a request's first step with K drafts that do not exist; they leave no context
    behind."""
    assert runs.differences(run, only=[LATE]) == []


@both
def test_several_completions(runs: Runs, run: int) -> None:
    first, second = runs.results[run].completions[SEVERAL]
    assert first != second
    assert runs.differences(run, lambda prompt, draft: draft.completion == 0, only=[SEVERAL]) == []
    assert runs.differences(run, lambda prompt, draft: draft.completion == 1, only=[SEVERAL]) == []


@both
def test_temperature_with_seed(runs: Runs, run: int) -> None:
    """The same seed gives the same output, also from a warm prefix cache and beside other
    requests."""
    outputs = runs.results[run].outputs
    assert outputs[SEEDED] == outputs[SEEDED_AGAIN]
    assert runs.differences(run, only=[SEEDED, SEEDED_AGAIN]) == []


@both
def test_penalties(runs: Runs, run: int) -> None:
    outputs, plain = runs.results[run].outputs, runs.results[PLAIN].outputs
    assert outputs[PENALISED] == plain[PENALISED]
    assert outputs[PENALISED] != outputs[NEW], "the same prompt without penalties"


@both
def test_logprobs(runs: Runs, run: int) -> None:
    ours, plain = runs.results[run].logprobs[LONG], runs.results[PLAIN].logprobs[LONG]
    assert len(ours) == len(plain) == 90
    for position, expected in zip(ours, plain, strict=True):
        assert [token for token, _ in position] == [token for token, _ in expected]
        assert [value for _, value in position] == pytest.approx(
            [value for _, value in expected], abs=1e-4
        )


@both
def test_abort_in_mid_flight(runs: Runs, run: int) -> None:
    """What an aborted request leaves behind in the batch's tables and in the KV cache touches
    nobody."""
    assert runs.results[run].completions[ABORTED] == []
    assert runs.results[run].drafts[ABORTED]
    assert runs.differences(run, only=[NEW]) == []


@tight
def test_preemption(runs: Runs, run: int) -> None:
    """A request that lost its pages in mid-decoding and was computed anew, or found some of them in
    the prefix cache."""
    lost = {
        prompt: length
        for prompt, length in runs.results[run].preempted
        if length > len(runs.results[run].prompts[prompt])
    }
    assert lost
    for prompt, length in lost.items():
        assert (
            runs.differences(
                run, lambda _, draft, length=length: draft.anchor >= length, only=[prompt]
            )
            == []
        )


def test_steps_that_draft_nothing(runs: Runs) -> None:
    """With K = 0 no query runs, and the context is written all the same: later drafts, and those of
    the next turn on the same pages, are whole."""
    undrafted = [work for work in runs.results[ZERO].work if not work.k]
    assert {(work.forwarded, work.ranked) for work in undrafted} == {(0, 0)}
    assert max(work.num_reqs for work in undrafted) > DRAFT_AT_MOST
    after = []
    for i in range(len(runs.jobs[ZERO].prompts)):
        for prompt, _, drafts in runs.drafts(ZERO, [i]):
            for one, other in pairwise([draft for draft in drafts if draft.anchor >= len(prompt)]):
                # A step commits the tokens of the draft before it; those without one, a token each.
                after += [(i, other.anchor)] if other.step > one.step + 1 else []
            first = next((draft for draft in drafts if draft.anchor >= len(prompt)), None)
            after += [(i, first.anchor)] if first and first.anchor > len(prompt) else []
    assert after, "no request went from K = 0 to K = 7"
    assert (
        runs.results[ZERO].cached_tokens[4] >= PAGE or len(runs.results[ZERO].prompts[4]) < 2 * PAGE
    )
    for i, anchor in after:
        assert (
            runs.differences(ZERO, lambda _, draft, anchor=anchor: draft.anchor >= anchor, only=[i])
            == []
        )
    assert runs.differences(ZERO, only=[4]) == []


def test_requests_that_say_how_much_is_drafted(runs: Runs) -> None:
    """A step commits one token of the one, of the other up to three; the output stays."""

    def most_committed(prompt: int) -> int:
        ((tokens, _, drafts),) = runs.drafts(TEXT, [prompt])
        steps = pairwise([draft.anchor for draft in drafts if draft.anchor >= len(tokens)])
        return max(other - one for one, other in steps)

    assert most_committed(OFF) == 1
    assert 1 < most_committed(AT_MOST_TWO) <= 3
    for prompt in (OFF, AT_MOST_TWO):
        assert runs.results[TEXT].outputs[prompt] == runs.results[PLAIN_TEXT].outputs[prompt]


def test_structured_output(runs: Runs) -> None:
    words, choice = runs.results[TEXT].texts[:2]
    assert words.endswith(".")
    assert {len(word) for word in words[:-1].split(" ")[1:]} == {4}
    assert choice in ("return None", "return self")
    assert runs.results[TEXT].outputs == runs.results[PLAIN_TEXT].outputs
    assert runs.differences(TEXT) == []

"""The profile of an engine's steps under the V2 runner: measured at its first start, read at the
second, and a guess where it cannot be measured. Nothing of it is in what is drafted and put out.
The engine that is measured schedules asynchronously, on the fake device with its graphs.

    pytest tests/engine/test_v2_profile.py
"""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from engine.v2_jobs import Job, Result, run_engines
from engine.v2_runs import Runs
from variants import VARIANTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FIXED, SHORT, MEASURED = range(3)


def start(jobs: list[Job], cache: Path) -> list[Result]:
    return run_engines(jobs, env={"VLLM_CACHE_ROOT": str(cache)})


@pytest.fixture(scope="module")
def starts(
    random_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runs, list[Result], list[tuple[str, int]]]:
    """Engines with a fixed K, too short to be measured, and measured; the last again; and, before
    and after that, the profiles with the times when they were written."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("pair")
    random = Random(5)
    fixed = Job(
        target=str(random_target),
        drafter=str(VARIANTS["dflash mixed causal"].make(folder)),
        num_speculative_tokens=3,
        prompts=[[random.randrange(2, 500) for _ in range(length)] for length in (3, 40, 9, 21)],
        max_tokens=12,
        max_model_len=128,
        max_num_seqs=4,
    )
    adaptive = replace(fixed, adaptive=None, device="graphs")  # by default
    short = replace(fixed, adaptive=True, prompts=[[2, 3, 4], [5]], max_tokens=8, max_model_len=16)
    jobs = [fixed, short, adaptive]  # what is scheduled asynchronously comes last
    runs = Runs(jobs, start(jobs, cache))
    written = [_written(cache)]
    again = start([adaptive], cache)
    return runs, again, [*written, _written(cache)]


def _written(cache: Path) -> list[tuple[str, int]]:
    return [(file.name, file.stat().st_mtime_ns) for file in cache.glob("dflash_profiles/*.json")]


def test_a_profile_is_measured_at_the_first_start(starts: tuple[Runs, list[Result], list]) -> None:
    profile = starts[0].results[MEASURED].profile
    assert profile is not None
    assert starts[0].results[MEASURED].adapts, "by default"
    at = dict(zip(profile["rows"], profile["target"], strict=True))
    assert {1, 4} <= at.keys()
    assert 0 < at[1] <= at[4]
    assert min(profile["draft"]) > 0


def test_a_second_start_reads_it(starts: tuple[Runs, list[Result], list]) -> None:
    runs, (again,), (before, after) = starts
    assert again.profile == runs.results[MEASURED].profile
    assert before == after
    assert len(before) == 1


def test_where_nothing_can_be_measured_a_guess_stands(
    starts: tuple[Runs, list[Result], list],
) -> None:
    short = starts[0].results[SHORT]
    assert short.profile is None
    assert short.adapts, "it was asked to"
    assert [len(output) for output in short.outputs] == [8, 8]


def test_each_decoding_step_has_a_graph_of_the_target(
    starts: tuple[Runs, list[Result], list],
) -> None:
    """Steps of the controller's whose drafts are cut, and those without any, had none."""
    for result in (starts[0].results[MEASURED], *starts[1]):
        assert result.is_asynchronous
        assert {tokens == num_reqs for num_reqs, tokens, _ in result.decodes} == {True, False}
        assert [decode for decode in result.decodes if not decode[2]] == []


def test_text_and_drafts_are_what_they_are_without(starts: tuple[Runs, list[Result], list]) -> None:
    """Drafts are the reference's, in pages in which what was measured wrote."""
    runs, (again,), _ = starts
    assert runs.results[MEASURED].outputs == runs.results[FIXED].outputs == again.outputs
    assert len(runs.compare(MEASURED)) >= 8
    assert runs.differences(MEASURED) == []
    # The controller may cut and leave out drafts, and takes the others as they are.
    fixed = {
        (i, draft.anchor): draft.tokens
        for i, drafts in enumerate(runs.results[FIXED].drafts)
        for draft in drafts
    }
    both = [
        (fixed[i, draft.anchor], draft.tokens)
        for i, drafts in enumerate(runs.results[MEASURED].drafts)
        for draft in drafts
        if (i, draft.anchor) in fixed
    ]
    assert len(both) >= 8
    assert all(ours == theirs for ours, theirs in both)

"""How long drafting can stay off at most, whatever was slow and whatever the load looks like, and
what that may cost.

    pytest tests/unit/test_adaptive_off.py
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from simulation import BAD, GOOD, Run, drafting, large_gpu, slow, two_cores
from vllm_dflash.adaptive.tuning import TUNING
from vllm_dflash.cost_profile import power
from vllm_dflash.metrics.drafting import status_of
from vllm_dflash.steps import Work


def longest(block: int = 8) -> int:
    """Most steps without a draft: what ``controller.py`` says, and the time between two choices."""
    return math.ceil(4 * block / TUNING.exploration) + 2 * TUNING.every


STALE = 128
"""Steps within which a wrong figure is looked at again where nothing was lost."""


def cheap(work: Work) -> float:
    """Seconds of a step where drafting pays at each of the batch sizes below."""
    return 1e-3 * (
        5 + 0.05 * work.num_tokens + (1.8 + 0.02 * work.draft_rows if work.draft_rows else 0)
    )


def test_first_drafts_of_several_batch_sizes_that_were_slow() -> None:
    """A machine that was busy for the first ten steps of each of five batch sizes: what the first
    drafts took beyond what was believed then was owed, for all sizes together, and drafting was off
    from step 50 to step 6,977. Nobody chose the first steps, so nothing is owed."""
    run = Run(slow(50, 16, drafts=True), cost=cheap, catches_up=0.0)
    for num_reqs in (1, 2, 4, 8, 16):
        run.requests = [f"{num_reqs}.{i}" for i in range(num_reqs)]
        run.run(10)
    plans = run.run(round(10 / TUNING.exploration) + 32)
    assert any(plan.num_draft_tokens for plan in plans)
    run.run(2 * STALE)
    assert drafting(run.run(200)) > 0.9


@pytest.mark.parametrize("held_up", [0.3, 6.0, 60.0])
@pytest.mark.parametrize("block", [8, 16])
def test_a_trial_whose_first_step_was_held_up(block: int, held_up: float) -> None:
    """The first drafts were slow, and so was the first step of the first trial, which writes the
    context: it was charged with ten times what a step may take, and drafting was off for up to
    26,750 steps with blocks of 16."""
    times = []

    def wrong(step: int, work: Work, seconds: float) -> float:
        if work.draft_rows and step >= 8:
            times.append(step)
        return seconds * (6000 if work.draft_rows and step < 8 else 1) + (
            held_up if times == [step] else 0.0
        )

    run = Run(wrong, block=block, catches_up=0.0)
    run.run(STALE + 3 * 32)
    assert times, "it was tried"
    began = run.step
    while drafting(run.run(32)) < 0.9:
        assert run.step - began < longest(block) + STALE, "another trial comes in time"
    gaps = np.diff([i for i, plan in enumerate(run.plans) if plan.num_draft_tokens])
    assert gaps.max() <= longest(block)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_batch_sizes_that_come_and_go(seed: int) -> None:
    """The number of requests wanders between 1 and 16, and the first drafts of each size were slow:
    at no size is drafting off for longer than a lost trial takes to be paid, in steps of that
    size."""
    random, num_reqs = np.random.default_rng(seed), 4
    seen: dict[int, int] = {}
    off: dict[int, int] = {}

    def wrong(step: int, work: Work, seconds: float) -> float:
        size = power(work.num_reqs)
        seen[size] = seen.get(size, 0) + (work.draft_rows > 0)
        return seconds * (16 if work.draft_rows and seen[size] <= 5 else 1)

    run = Run(wrong, cost=cheap, catches_up=1e-4)
    for _ in range(12000):
        if random.random() < 0.05:
            num_reqs = int(np.clip(num_reqs + random.integers(-2, 3), 1, 16))
        run.requests = [f"r{i}" for i in range(num_reqs)]
        [plan] = run.run(1)
        size = power(num_reqs)
        off[size] = 0 if plan.num_draft_tokens else off.get(size, 0) + 1
        assert off[size] <= longest()
    assert drafting(run.plans[-2000:]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("cost", [two_cores, large_gpu])
def test_never_slower_for_good_whatever_is_forgiven(cost: Callable[[Work], float]) -> None:
    """Drafts that bring nothing and whose first step after a pause takes as long as forty plain
    ones, more than is ever owed, at a load of 1 and of 32 requests in turn: 0.97 of plain
    decoding's tokens a second or more."""
    run = Run(lambda step, work, seconds: seconds, cost=cost, catches_up=0.0)
    plain = 0.0
    for turn in range(40):
        num_reqs = (1, 32)[turn % 2]
        run.requests = [f"{num_reqs}.{i}" for i in range(num_reqs)]
        for _ in range(400):
            run.catches_up = 40 * cost(Work(num_reqs, num_reqs, 0)) / max(run.waiting, 1)
            tokens, seconds = run.tokens, run.seconds
            run.run(1, BAD)
            if turn < 2:  # first steps
                run.tokens, run.seconds = tokens, seconds
            else:
                plain += cost(Work(num_reqs, num_reqs, 0)) * (run.tokens - tokens) / num_reqs
    assert plain / run.seconds > 0.97


@pytest.mark.parametrize("rates", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("num_reqs", [4, 16])
def test_a_prompt_or_an_end_in_every_step(rates: list[float], num_reqs: int) -> None:
    """Short answers that end one after the other: no step was all decoding, every second one
    drafted for ever, and why was ``first``. What such steps took has to do."""
    run = Run(lambda step, work, seconds: seconds, num_reqs, cost=cheap)
    rows = np.random.default_rng(0).integers(0, 60, 4000)
    told = {"prompts": True, "prompt_rows": lambda step: int(rows[step])}
    run.run(4 * STALE, rates, **told)
    assert status_of(run.controller).why == ("pays" if rates is GOOD else "rejected")
    share = drafting(run.run(400, rates, **told))
    assert share > 0.9 if rates is GOOD else share < 0.1
    run.run(2 * STALE, rates)
    share = drafting(run.run(200, rates))
    assert share > 0.9 if rates is GOOD else share < 0.1, "and the same once steps are measured"


def test_steps_of_which_nothing_is_known() -> None:
    """No time at all: the profile says whether drafts pay, and goes on saying it."""
    run = Run(lambda step, work, seconds: seconds)
    run.run(STALE + 8, prompts=True)
    assert drafting(run.run(4 * STALE, prompts=True)) > 0.9
    run.run(2 * STALE, BAD)
    assert drafting(run.run(200, BAD)) < 0.1


def test_few_steps_are_measured() -> None:
    """Trials and the last steps before one, by which it is judged; of the others about one between
    two choices."""
    run, found = Run(lambda step, work, seconds: seconds), list[tuple[bool, str]]()
    for _ in range(1200):
        [plan] = run.run(1, BAD)
        found.append((run.controller.measures(plan), plan.why))
    begins = [
        i for i in range(20, len(found)) if (found[i - 1][1], found[i][1]) == ("best", "trial")
    ]
    assert len(begins) > 2
    between = list[bool]()
    for first, last in pairwise(begins):
        assert all(measured for measured, _ in found[last - TUNING.window : last + 3])
        between += [measured for measured, _ in found[first + 3 : last - TUNING.window]]
    assert sum(between) < 2 * len(between) / TUNING.every

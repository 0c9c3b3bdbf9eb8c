"""What was measured wrong once is measured again: within how many steps the controller comes back,
for every figure that it keeps.

pytest tests/unit/test_adaptive_stale.py
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from simulation import large_gpu, two_cores
from vllm_dflash.adaptive.controller import Controller
from vllm_dflash.adaptive.cost import STALE, Work, power
from vllm_dflash.adaptive.plans import Plan
from vllm_dflash.adaptive.trials import _SAVED, EXPLORATION

GOOD, BAD = [0.8, 0.78, 0.76, 0.74, 0.72, 0.7, 0.68], [0.01] * 7
PLAIN = two_cores(Work(1, 1, 0))
RETURN = round(_SAVED / EXPLORATION) + 3 * STALE
"""Steps within which a wrong figure has to be seen through: the longest patience, and what the
trials after it take."""


class Run:
    """One engine's steps; ``wrong`` gives what was measured in place of the true seconds, by step
    and what it computed."""

    def __init__(
        self,
        wrong: Callable[[int, Work, float], float],
        num_reqs: int = 1,
        cost: Callable[[Work], float] = two_cores,
        block: int = 8,
        catches_up: float | None = None,
    ) -> None:
        """``catches_up``: seconds more for each step without a draft, where the next one drafts;
        None: no step is said to write a backlog."""
        self.controller, self.wrong, self.cost = Controller(block - 1, block), wrong, cost
        self.block, self.catches_up, self.waiting = block, catches_up, 0
        self.requests, self.random = [f"r{i}" for i in range(num_reqs)], np.random.default_rng(0)
        self.lengths: dict[str, int] = {}
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.plans: list[Plan] = []

    def run(
        self,
        steps: int,
        rates: list[float] = GOOD,
        prompts: bool = False,
        rough: bool = False,
        prompt_rows: Callable[[int], int] = lambda step: 0,
    ) -> list[Plan]:
        """So many more steps; returns their plans. ``prompts``: each has one in it, of
        ``prompt_rows`` by step; ``rough``: what such steps took is told as that."""
        for _ in range(steps):
            plan = self.controller.plan(self.requests)
            outcomes = {}
            for request in self.requests:
                count, accepted = self.lengths.get(request, 0), 0
                while (
                    accepted < count and self.random.random() < rates[min(accepted, len(rates) - 1)]
                ):
                    accepted += 1
                outcomes[request] = (count, accepted)
                self.tokens += accepted + 1
            num_reqs, verified = len(self.requests), sum(count for count, _ in outcomes.values())
            drafts, rows = plan.num_draft_tokens > 0, num_reqs + verified + prompt_rows(self.step)
            work = Work(num_reqs, rows, self.block * num_reqs if drafts else 0)
            seconds = self.cost(work) + (self.catches_up or 0.0) * self.waiting * drafts
            self.seconds += seconds
            self.controller.observe(
                None if prompts else work,
                self.wrong(self.step, work, seconds),
                outcomes,
                writes_backlog=self.catches_up is not None and drafts and self.waiting > 0,
                **({"rough": work} if rough else {}),
            )
            self.waiting = 0 if drafts else self.waiting + 1
            self.lengths = self.controller.lengths(self.requests, plan)
            self.step += 1
            self.plans.append(plan)
        return self.plans[-steps:]


def drafting(plans: list[Plan]) -> float:
    """Share of the steps that drafted."""
    return sum(plan.num_draft_tokens > 0 for plan in plans) / len(plans)


def slow(last: int, factor: float, drafts: bool) -> Callable[[int, Work, float], float]:
    """Up to step ``last`` those with the drafter, or those without, take ``factor`` times as
    long."""
    return lambda step, work, seconds: (
        seconds * (factor if step < last and bool(work.draft_rows) == drafts else 1)
    )


@pytest.mark.parametrize("factor", [16, 200, 6000], ids=["482 ms", "6 s", "three minutes"])
@pytest.mark.parametrize("num_reqs", [1, 4])
def test_first_drafts_that_were_slow(factor: float, num_reqs: int) -> None:
    """First drafts of 482 ms beside plain steps of 29: drafting stayed off for 2,950 choices, for
    no budget paid for such a step."""
    run = Run(slow(8, factor, drafts=True), num_reqs)
    run.run(RETURN)
    assert drafting(run.run(200)) > 0.9


@pytest.mark.parametrize("factor", [16, 6000])
def test_first_plain_steps_that_were_slow(factor: float) -> None:
    """Drafts that bring nothing were made for ever, as no budget paid for a plain step to be
    measured again."""
    run = Run(slow(9, factor, drafts=False))
    run.run(RETURN, BAD)
    assert drafting(run.run(400, BAD)) < 0.1


def test_a_batch_size_that_was_seen_once() -> None:
    """Its first drafts were slow; then the server had one request for long, and now has as many as
    then."""
    run = Run(slow(8, 16, drafts=True), 4)
    run.run(10)
    many, run.requests = run.requests, ["r0"]
    run.run(2000)
    run.requests = many
    run.run(RETURN)
    assert drafting(run.run(200)) > 0.9


def test_whole_drafts_that_were_slow_once() -> None:
    """Steps that verified more than three tokens were slow for a while: shorter drafts were
    verified for good, none longer was tried."""
    run = Run(
        lambda step, work, seconds: seconds * (12 if step < 60 and work.num_tokens > 4 else 1)
    )
    run.run(1500)
    # The mean of what is verified, against what is best: all or nearly all of the draft.
    before = run.tokens, run.seconds
    run.run(600)
    reference = Run(lambda step, work, seconds: seconds)
    reference.run(1500)
    known = reference.tokens, reference.seconds
    reference.run(600)
    rate = (run.tokens - before[0]) / (run.seconds - before[1])
    assert rate > 0.93 * (reference.tokens - known[0]) / (reference.seconds - known[1])


def test_text_that_the_drafter_did_not_know() -> None:
    run = Run(lambda step, work, seconds: seconds)
    run.run(2000, BAD)
    run.run(3000)
    assert drafting(run.run(200)) > 0.9


@pytest.mark.parametrize("at", [0, 3, 6, 8, 12, 40, 300])
@pytest.mark.parametrize("rates", [GOOD, BAD], ids=["good", "bad"])
def test_a_process_that_was_suspended(at: int, rates: list[float]) -> None:
    """One step of three hours, whichever it is: it decides nothing for good, and buys no hours of
    trials."""
    run = Run(lambda step, work, seconds: seconds + (10800.0 if step == at else 0.0))
    run.run(at + RETURN, rates)
    share = drafting(run.run(400, rates))
    assert share > 0.9 if rates is GOOD else share < 0.1


@pytest.mark.parametrize("rates", [GOOD, BAD], ids=["good", "bad"])
def test_a_machine_that_was_slow_at_first(rates: list[float]) -> None:
    """All of the first 60 steps took a minute: the pace follows, what drafting is worth does not
    change."""
    run = Run(lambda step, work, seconds: 60.0 if step < 60 else seconds)
    run.run(60 + RETURN, rates)
    share = drafting(run.run(400, rates))
    assert share > 0.9 if rates is GOOD else share < 0.1


def test_a_trial_that_was_held_up_too() -> None:
    """The first steps and the first trial were slow: the next trial comes within the bound, with
    each owed at most its rows' price."""
    run = Run(slow(STALE + 80, 6000, drafts=True))
    bound = round(4 * 8 / EXPLORATION) + 2 * STALE
    run.run(STALE + 80)
    run.run(bound)
    assert drafting(run.run(200)) > 0.9


def test_the_controller_says_why_it_is_off_and_when_it_tries_again() -> None:
    """What it says of the next trial is when that comes, to a choice or two."""
    run = Run(slow(10**6, 3, drafts=True))
    assert run.controller.status().why == "first"
    for told in (0.05, 0.2, 0.5):
        while True:
            run.run(1, BAD)
            status = run.controller.status()
            if (
                status.next_trial is not None
                and status.next_trial > told * 2
                and run.plans[-1].why == "best"
            ):
                break
        assert not status.drafting
        assert status.measured is not None
        began, said = run.step, status.next_trial
        while run.run(1, BAD)[-1].why != "trial":
            assert run.step < began + 3000
        assert (run.step - began) * PLAIN <= 1.5 * said + 2 * 32 * PLAIN
    known = Run(lambda step, work, seconds: seconds)
    known.run(300)
    assert (known.controller.status().drafting, known.controller.status().why) == (True, "pays")
    slow_run = Run(slow(10**6, 16, drafts=True))
    slow_run.run(100)
    assert (slow_run.controller.status().drafting, slow_run.controller.status().why) == (
        False,
        "slow",
    )
    unknown = Run(lambda step, work, seconds: seconds)
    unknown.run(600, BAD)
    assert (unknown.controller.status().drafting, unknown.controller.status().why) == (
        False,
        "rejected",
    )


def test_prompts_in_every_step_for_long() -> None:
    run = Run(lambda step, work, seconds: seconds)
    run.run(500, prompts=True)
    run.run(50)
    assert drafting(run.run(200)) > 0.9


@pytest.mark.parametrize("factor", [3, 7])
def test_drafts_that_are_slow_in_truth(factor: float) -> None:
    """What a trial loses is owed: on credit or not, they lose no more than their share after the
    first steps."""
    run = Run(
        lambda step, work, seconds: seconds,
        cost=lambda work: two_cores(work) * (factor if work.draft_rows else 1),
    )
    run.run(200)
    before = run.tokens, run.seconds
    run.run(10000)
    lost = 1 - (run.tokens - before[0]) / (run.seconds - before[1]) * PLAIN
    assert lost < 0.0125


def longest(block: int = 8) -> int:
    """Most steps without a draft where a trial lost: what ``trials.py`` says."""
    return math.ceil(4 * block / EXPLORATION) + 3 * 32


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
    plans = run.run(round(_SAVED / EXPLORATION) + 32)
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
    told = {"prompts": True, "rough": True, "prompt_rows": lambda step: int(rows[step])}
    run.run(4 * STALE, rates, **told)
    assert run.controller.status().why == ("pays" if rates is GOOD else "rejected")
    share = drafting(run.run(400, rates, **told))
    assert share > 0.9 if rates is GOOD else share < 0.1
    run.run(2 * STALE, rates)
    share = drafting(run.run(200, rates))
    assert share > 0.9 if rates is GOOD else share < 0.1, "and the same once steps are measured"


def test_steps_of_which_nothing_is_known() -> None:
    """No time at all: drafts are whole as without a controller after the first steps, which are
    made again now and then."""
    run = Run(lambda step, work, seconds: seconds)
    run.run(STALE + 8, prompts=True)
    assert drafting(run.run(4 * STALE, prompts=True)) > 0.95
    run.run(2 * STALE, BAD)
    assert drafting(run.run(200, BAD)) < 0.1

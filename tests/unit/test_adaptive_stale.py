"""What was measured wrong once is measured again: within how many steps the controller comes back,
for every figure that it keeps.

pytest tests/unit/test_adaptive_stale.py
"""

import pytest

from simulation import BAD, GOOD, Run, drafting, profile_of, slow, two_cores
from vllm_dflash.adaptive.tuning import TUNING
from vllm_dflash.metrics.drafting import status_of
from vllm_dflash.steps import Work

PLAIN = two_cores(Work(1, 1, 0))
STALE = 128
RETURN = round(10 / TUNING.exploration) + 3 * STALE
"""Steps within which a wrong figure has to be seen through: the longest patience, and what the
trials after it take."""


@pytest.mark.parametrize("factor", [16, 200, 6000], ids=["482 ms", "6 s", "three minutes"])
@pytest.mark.parametrize("num_reqs", [1, 4])
def test_first_drafts_that_were_slow(factor: float, num_reqs: int) -> None:
    """First drafts of 482 ms beside plain steps of 29: drafting stayed off for 2,950 choices, for
    no budget paid for such a step."""
    run = Run(slow(8, factor, drafts=True), num_reqs)
    run.run(RETURN)
    assert drafting(run.run(200)) > 0.9


@pytest.mark.parametrize("drafts", [True, False], ids=["drafts", "plain steps"])
@pytest.mark.parametrize("factor", [1 / 6000, 1 / 16, 16, 6000])
@pytest.mark.parametrize("num_reqs", [1, 4])
@pytest.mark.parametrize("rates", [GOOD, BAD], ids=["good", "bad"])
def test_a_profile_that_was_measured_wrong(
    drafts: bool, factor: float, num_reqs: int, rates: list[float]
) -> None:
    """The warm-up was held up in all that it measured of the one kind, or was there only once and
    by another machine."""
    profile = profile_of(
        two_cores,
        7,
        wrong=lambda work, seconds: seconds * (factor if drafts == bool(work.draft_rows) else 1.0),
    )
    run = Run(lambda step, work, seconds: seconds, num_reqs, profile=profile)
    run.run(RETURN, rates)
    share = drafting(run.run(400, rates))
    assert share > 0.9 if rates is GOOD else share < 0.1


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
    bound = round(4 * 8 / TUNING.exploration) + 2 * STALE
    run.run(STALE + 80)
    run.run(bound)
    assert drafting(run.run(200)) > 0.9


def test_the_controller_says_why_it_is_off_and_when_it_tries_again() -> None:
    """What it says of the next trial is when that comes, to a choice or two."""
    run = Run(slow(10**6, 3, drafts=True))
    assert status_of(run.controller).why == "first"
    for told in (0.05, 0.2, 0.5):
        while True:
            run.run(1, BAD)
            status = status_of(run.controller)
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
    assert (status_of(known.controller).drafting, status_of(known.controller).why) == (True, "pays")
    slow_run = Run(slow(10**6, 16, drafts=True))
    slow_run.run(104)
    assert (status_of(slow_run.controller).drafting, status_of(slow_run.controller).why) == (
        False,
        "slow",
    )
    unknown = Run(lambda step, work, seconds: seconds)
    unknown.run(600, BAD)
    assert (status_of(unknown.controller).drafting, status_of(unknown.controller).why) == (
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

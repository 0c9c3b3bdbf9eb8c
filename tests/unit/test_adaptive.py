"""The controller against what is best in hindsight, on servers in numbers
(``tests/simulation.py``): two cores, and a large GPU."""

from collections.abc import Sequence

import numpy as np
import pytest

from simulation import Server, large_gpu, long_contexts, profile_of, two_cores
from vllm_dflash.adaptive.acceptance import Acceptance, GroupOf
from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.cost import StepCost
from vllm_dflash.adaptive.tuning import TUNING
from vllm_dflash.cost_profile import GUESS, round_rows
from vllm_dflash.steps import Work

RATES = {
    "good": [0.8, 0.78, 0.76, 0.74, 0.72, 0.7, 0.68],
    "fair": [0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3],
    "bad": [0.01] * 7,
}


PROFILE = profile_of(two_cores, 7)


@pytest.mark.slow
@pytest.mark.parametrize("cost", [two_cores, large_gpu])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("num_reqs", [1, 8, 32])
def test_close_to_the_best_fixed_choice(cost, rates: str, num_reqs: int) -> None:
    """Measured times are noisy, and one in a hundred steps is held up by another process."""
    batches = [{f"r{i}": RATES[rates] for i in range(num_reqs)}] * 2000
    server = Server(cost, noise=0.08, held_up=0.01)
    best = max(server.fixed(k, batches) for k in range(8))
    assert server.adaptive(batches) > 0.95 * best


@pytest.mark.slow
@pytest.mark.parametrize("cost", [two_cores, large_gpu])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("num_reqs", [1, 8, 32])
def test_without_a_profile(cost, rates: str, num_reqs: int) -> None:
    """Where none could be measured the controller begins with a guess, and finds out what drafting
    costs; a row's own cost stays a guess."""
    batches = [{f"r{i}": RATES[rates] for i in range(num_reqs)}] * 1000
    server = Server(cost, noise=0.08, held_up=0.01)
    best = max(server.fixed(k, batches) for k in (0, 7))
    controller = server.controller(profile=GUESS)
    assert server.adaptive(batches, controller) > 0.9 * best


@pytest.mark.parametrize("seed", range(8))
def test_bad_luck_does_not_last(seed: int) -> None:
    """One request, and drafting pays little: a few drafts with bad luck must not end it for
    good."""
    batches = [{"r0": RATES["fair"]}] * 2000
    best = max(
        Server(two_cores, noise=0.08, held_up=0.01, seed=seed).fixed(k, batches)
        for k in range(1, 4)
    )
    assert Server(two_cores, noise=0.08, held_up=0.01, seed=seed).adaptive(batches) > 0.95 * best


def test_catching_up_is_paid_for_and_is_not_what_drafting_costs() -> None:
    """The first draft after steps without writes the context of them all and takes five times as
    long; the next ones do not."""
    controller, drafted = Controller(7, 8, profile=PROFILE), 0
    requests, lost = [f"r{i}" for i in range(8)], list[float]()
    for _ in range(3200):
        plan = controller.plan(requests)
        now = plan.num_draft_tokens
        work, writes_backlog = Work(8, 8 + 8 * drafted, 64 if now else 0), bool(now and not drafted)
        seconds = two_cores(work) * (5 if writes_backlog else 1)
        controller.observe(
            work,
            seconds,
            dict.fromkeys(requests, (drafted, 0)) if drafted else {},
            plan=plan,
            writes_backlog=writes_backlog,
        )
        lost.append(seconds - two_cores(Work(8, 8, 0)))
        drafted = now
    draft = Work(8, 8, 64)
    assert controller.cost.seconds(draft) == pytest.approx(two_cores(draft), rel=0.05)
    assert 0 < sum(lost[200:]) < 0.01 * 3000 * two_cores(Work(8, 8, 0))


@pytest.mark.parametrize("num_reqs", [1, 2, 4, 8])
@pytest.mark.parametrize("rates", ["good", "fair"])
def test_a_machine_that_others_share(rates: str, num_reqs: int) -> None:
    """Its pace changes by up to two thirds every some 60 steps: what is measured at one pace is not
    held against what was at another."""
    batches = [{f"r{i}": RATES[rates] for i in range(num_reqs)}] * 1500
    server = Server(two_cores, noise=0.08, held_up=0.01, drift=0.6)
    best = max(server.fixed(k, batches) for k in (0, 7))
    assert server.adaptive(batches) > 0.95 * best


@pytest.mark.slow
def test_each_request_has_its_own_length() -> None:
    """Requests that accept much beside others that accept little: better than any one K for all."""
    batches = [{f"r{i}": RATES["good" if i % 2 else "bad"] for i in range(32)}] * 2000
    server = Server(large_gpu, noise=0.08)
    assert server.adaptive(batches) > max(server.fixed(k, batches) for k in range(8))


@pytest.mark.slow
@pytest.mark.parametrize("skips", [True, False], ids=["skips", "drafts for all"])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("contexts", [[1 << 15, *[128] * 7], [1 << 13] * 4, [1 << 15]])
def test_long_contexts(contexts: list[int], rates: str, skips: bool) -> None:
    """One request of 32k positions among seven short ones, and long ones alone: as good as the best
    of no drafts, drafts for all, and drafts for the short ones only."""
    requests = {f"r{i}": context for i, context in enumerate(contexts)}
    batches = [dict.fromkeys(requests, RATES[rates])] * 1000
    server = Server(long_contexts, noise=0.05, contexts=requests, skips=skips)
    long = frozenset(name for name, context in requests.items() if context >= 1 << 15)
    best = max(server.fixed(k, batches, skipped) for k in range(8) for skipped in (long, set()))
    assert server.adaptive(batches) >= 0.97 * best


@pytest.mark.slow
def test_the_drafters_confidence_is_used() -> None:
    """Drafts differ, the drafter says how, and it thinks too well of itself: verifying each as far
    as it pays beats every fixed K."""
    batches = [{f"r{i}": RATES["good"] for i in range(32)}] * 1000
    best = max(Server(large_gpu, spread=2.0, noise=0.05).fixed(k, batches) for k in range(8))
    assert Server(large_gpu, spread=2.0, noise=0.05, confident=True).adaptive(batches) > 1.01 * best
    assert Server(large_gpu, spread=2.0, noise=0.05).adaptive(batches) > 0.95 * best


def _observe(
    acceptance: Acceptance,
    request: str,
    verified: int,
    accepted: int,
    confidences: Sequence[float] | None = None,
) -> None:
    """And as at a choice, what was taken in is looked at."""
    said = {request: confidences} if confidences else None
    acceptance.drafted([request], [0.0], said)
    acceptance.learn({request: (verified, accepted)}, said)
    acceptance.expected([request])


def _survival(
    acceptance: Acceptance, request: str, confidences: Sequence[float] | None = None
) -> list[float]:
    return acceptance.drafted([request], [0.0], {request: confidences} if confidences else None)[0]


def _acceptance(max_draft: int, group: GroupOf = lambda _: None) -> Acceptance:
    return Acceptance(max_draft, TUNING, group, None)


def test_confidence_is_calibrated() -> None:
    """A drafter that is sure of everything and right half the time is taken at half, also at a
    position that was never reached."""
    acceptance = _acceptance(2)
    for i in range(400):
        _observe(acceptance, "a", verified=1, accepted=i % 2, confidences=[0.95, 0.95])
    assert _survival(acceptance, "b", [0.95, 0.95]) == pytest.approx([0.5, 0.25], rel=0.1)
    assert _survival(acceptance, "b", [0.3, 0.3])[0] < 0.5


def test_off_under_load_and_back() -> None:
    """The load swings from 1 request to 32 and back: each phase has the K that is best for it, none
    among them."""
    server = Server(two_cores, noise=0.05)
    controller = server.controller()
    for _ in range(2):
        for num_reqs, drafts in ((1, True), (32, False)):
            requests = [f"r{i}" for i in range(num_reqs)]
            server.adaptive([dict.fromkeys(requests, RATES["good"])] * 300, controller)
            planned = [controller.plan(requests).num_draft_tokens for _ in range(3)]
            assert (min(planned) > 2) if drafts else (max(planned) == 0)


def test_a_pause_buys_no_trials() -> None:
    """The time of a step in which the process was stopped for three seconds is not time that trials
    may cost a share of."""

    def trials(pause: float) -> int:
        controller, found, drafted = Controller(7, 8, profile=PROFILE), 0, 0
        requests = [f"r{i}" for i in range(8)]
        for step in range(800):
            plan = controller.plan(requests)
            found += plan.why == "trial"
            work = Work(8, 8 + 8 * drafted, 64 if plan.num_draft_tokens else 0)
            controller.observe(
                work,
                two_cores(work) + (pause if step % 40 == 39 else 0.0),
                dict.fromkeys(requests, (drafted, 0)),
                plan=plan,
            )
            drafted = plan.num_draft_tokens
        return found

    assert trials(3.0) <= trials(0.0) + 1


def test_a_slower_machine_is_slower_at_all_it_does() -> None:
    """Steps without drafts, the only ones of late, take half as long again: so will one that
    drafts, and when both recover both are cheap again."""
    cost, plain, draft = StepCost(PROFILE, TUNING), Work(2, 2, 0), Work(2, 16, 16)
    for work, pace, times in ((plain, 1.0, 9), (draft, 1.0, 9), (plain, 1.5, 40)):
        for _ in range(times):
            cost.observe(work, pace * two_cores(work))
    assert cost.seconds(draft) == pytest.approx(1.5 * two_cores(draft), rel=0.03)
    for _ in range(9):
        cost.observe(draft, two_cores(draft))
    assert cost.seconds(plain) == pytest.approx(two_cores(plain), rel=0.03)


def test_what_drafting_takes_beside_the_profile_is_learned() -> None:
    """The drafter takes three times what the profile says, the target as long."""
    cost = StepCost(PROFILE, TUNING)

    def slow(work: Work) -> float:
        plain = Work(work.num_reqs, work.num_tokens, 0)
        return 3 * two_cores(work) - 2 * two_cores(plain)

    for _ in range(6):
        for work, times in ((Work(2, 2, 0), 9), (Work(2, 16, 16), 4)):
            for _ in range(times):
                cost.observe(work, slow(work) if work.draft_rows else two_cores(work))
    for work in (Work(2, 16, 16), Work(2, 6, 16)):
        assert cost.seconds(work) == pytest.approx(slow(work), rel=0.03)
    other = Work(16, 64, 128)
    assert cost.seconds(other) == pytest.approx(slow(other), rel=0.03), "of another size too"
    assert cost.seconds(Work(16, 16, 0)) == pytest.approx(two_cores(Work(16, 16, 0)), rel=0.03)


def test_a_plain_step_is_known_once_it_was_measured() -> None:
    """The metrics hold it against what was drafted: a guess will not do."""
    assert StepCost(PROFILE, TUNING).plain_seconds(4, 0) == pytest.approx(
        two_cores(Work(4, 4, 0)), rel=0.01
    )
    cost = StepCost(GUESS, TUNING)
    assert cost.plain_seconds(4, 0) is None
    for _ in range(9):
        cost.observe(Work(4, 4, 0), 0.5)
    assert cost.plain_seconds(4, 0) == pytest.approx(0.5)


def test_steps_that_cannot_be_measured() -> None:
    """Prompts in every step, for as long as one likes: the profile says what pays."""
    controller = Controller(7, 8, profile=PROFILE)
    for _ in range(50):
        assert controller.plan(["a", "b"]).why in ("best", "trial")
        controller.observe(None, 0.0, {})


def test_a_step_that_was_held_up_tells_nothing_of_its_kind() -> None:
    """One step takes three times as long as those after it, as one whose kernels are made."""
    cost, work = StepCost(PROFILE, TUNING), Work(4, 4, 0)
    for factor in (3.0, 1.0, 1.0):
        cost.observe(work, factor * two_cores(work))
    assert cost.seconds(work) == pytest.approx(two_cores(work), rel=0.01)


def test_acceptance_is_conditional() -> None:
    """A position counts only where it was reached: two of three accepted are not three of four
    rejected, and of the fourth nothing is known but what the others have in common."""
    acceptance = _acceptance(4)
    for _ in range(400):
        _observe(acceptance, "a", verified=3, accepted=2)
    survival = np.array(_survival(acceptance, "b"))
    first, second, third, fourth = survival / np.array([1.0, *survival[:-1]])
    assert min(first, second) > 0.98
    assert third < 0.02
    assert 0.4 < fourth < 0.9
    controller = Controller(4, 5)
    controller.acceptance = acceptance
    assert controller.lengths(["a"], Plan(4, 0.5)) == {"a": 2}


def test_groups_are_learned_apart() -> None:
    """What sampled requests reject says nothing of greedy ones; a batch of both is expected to do
    as its parts."""
    acceptance = _acceptance(2, lambda name: name[0])
    for _ in range(100):
        for name, accepted in (("s1", 0), ("g1", 2)):
            _observe(acceptance, name, 2, accepted, [0.7, 0.7])
        acceptance.forget({"s1", "g1"})
    assert _survival(acceptance, "s2", [0.7, 0.7])[0] < 0.1
    assert _survival(acceptance, "g2", [0.7, 0.7])[0] > 0.9
    both = acceptance.expected(["s2", "g2", "s3"])
    assert both[[0, 2], 1:, 0].max() < 0.1
    assert both[1, 1:, 0].min() > 0.9
    usual = TUNING.usual
    assert acceptance.expected(["new"])[0].tolist() == [pytest.approx([usual, usual**2])]


def test_a_plan_stands_for_some_steps() -> None:
    """And is made anew for another number of requests, and for others at the next choice although
    nothing was learned."""
    contexts = {"b": 1 << 16}
    profile = profile_of(long_contexts, 7, contexts=[1 << 12, 1 << 15])
    controller = Controller(7, 8, context=lambda name: contexts.get(name, 0), profile=profile)
    plans = [controller.plan(["a"]) for _ in range(200)]
    assert len({id(plan) for plan in plans[-2 * TUNING.every :]}) < 8
    assert controller.kept_plan(2) is None, "another number of requests"
    found = [controller.plan(["b"]).num_draft_tokens for _ in range(2 * TUNING.every)]
    assert plans[-1].num_draft_tokens > min(found) == 0


def test_rows_come_in_round_numbers() -> None:
    """Four numbers an octave, and the likeliest tokens are the ones that stay."""
    assert [round_rows(n) for n in (1, 7, 8, 15, 17, 31, 33, 62, 130)] == [
        1,
        7,
        8,
        16,
        16,
        32,
        32,
        64,
        128,
    ]
    controller, requests = Controller(7, 8), [f"r{i}" for i in range(16)]
    confidences = {
        name: [0.99 - 0.05 * i - 0.001 * n for i in range(7)] for n, name in enumerate(requests)
    }
    survival = {n: _survival(controller.acceptance, n, said) for n, said in confidences.items()}
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        lengths = controller.lengths(requests, Plan(7, threshold), confidences)
        rows = len(requests) + sum(lengths.values())
        assert rows == round_rows(rows)
        kept = [p for name in requests for p in survival[name][: lengths[name]]]
        left = [p for name in requests for p in survival[name][lengths[name] :]]
        assert not kept or not left or min(kept) >= max(left)
    whole = controller.lengths(requests, Plan(7), confidences)
    assert sum(whole.values()) == 7 * 16, "all where all pay"

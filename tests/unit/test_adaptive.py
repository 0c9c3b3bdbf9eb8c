"""The controller against what is best in hindsight, on servers in numbers
(``tests/simulation.py``): two cores, and a large GPU."""

import pytest

from simulation import Server, large_gpu, two_cores
from vllm_dflash.adaptive.acceptance import Acceptance, round_rows
from vllm_dflash.adaptive.controller import Controller
from vllm_dflash.adaptive.cost import StepCost, Work

RATES = {
    "good": [0.8, 0.78, 0.76, 0.74, 0.72, 0.7, 0.68],
    "fair": [0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3],
    "bad": [0.01] * 7,
}


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
    controller, requests, drafted = Controller(7, 8), [f"r{i}" for i in range(8)], 0
    lost: list[float] = []
    for _ in range(1200):
        now = controller.plan(requests).num_draft_tokens
        work, writes_backlog = Work(8, 8 + 8 * drafted, 64 if now else 0), bool(now and not drafted)
        seconds = two_cores(work) * (5 if writes_backlog else 1)
        controller.observe(
            work,
            seconds,
            dict.fromkeys(requests, (drafted, 0)) if drafted else {},
            writes_backlog=writes_backlog,
        )
        lost.append(seconds - two_cores(Work(8, 8, 0)))
        drafted = now
    draft = Work(8, 8, 64)
    assert controller.cost.near(8).seconds(draft) == pytest.approx(two_cores(draft), rel=0.05)
    assert 0 < sum(lost[200:]) < 0.02 * 1000 * two_cores(Work(8, 8, 0))


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
def test_the_drafters_confidence_is_used() -> None:
    """Drafts differ, the drafter says how, and it thinks too well of itself: verifying each as far
    as it pays beats every fixed K."""
    batches = [{f"r{i}": RATES["good"] for i in range(32)}] * 1000
    best = max(Server(large_gpu, spread=2.0, noise=0.05).fixed(k, batches) for k in range(8))
    assert Server(large_gpu, spread=2.0, noise=0.05, confident=True).adaptive(batches) > 1.01 * best
    assert Server(large_gpu, spread=2.0, noise=0.05).adaptive(batches) > 0.95 * best


def test_confidence_is_calibrated() -> None:
    """A drafter that is sure of everything and right half the time is taken at half, also at a
    position that was never reached."""
    acceptance = Acceptance(2)
    for i in range(400):
        acceptance.observe("a", verified=1, accepted=i % 2, confidences=[0.95])
    assert acceptance.survival("b", 2, [0.95, 0.95]) == pytest.approx([0.5, 0.25], rel=0.1)
    assert acceptance.survival("b", 1, [0.3])[0] < 0.5


def test_off_under_load_and_back() -> None:
    """The load swings from 1 request to 32 and back: each phase has the K that is best for it, none
    among them."""
    controller, server = Controller(7, 8), Server(two_cores, noise=0.05)
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
        controller, requests, found = Controller(7, 8), [f"r{i}" for i in range(8)], 0
        drafted = 0
        for step in range(800):
            plan = controller.plan(requests)
            found += plan.why == "trial"
            work = Work(8, 8 + 8 * drafted, 64 if plan.num_draft_tokens else 0)
            controller.observe(
                work,
                two_cores(work) + (pause if step % 40 == 39 else 0.0),
                dict.fromkeys(requests, (drafted, 0)),
            )
            drafted = plan.num_draft_tokens
        return found

    assert trials(3.0) <= trials(0.0) + 1


def test_cost_recovers_the_line() -> None:
    cost = StepCost()
    for _ in range(9):
        for num_reqs in (1, 2, 4, 8):
            for k, verified in ((0, 0), (7, 7), (7, 0), (0, 7), (3, 3)):
                work = Work(num_reqs, num_reqs * (verified + 1), num_reqs * (k + 1) if k else 0)
                cost.observe(work, two_cores(work))
    unseen = Work(6, 6 * 6, 6 * 6)
    assert cost.near(6).seconds(unseen) == pytest.approx(two_cores(unseen), rel=0.05)


def test_a_slower_machine_is_slower_at_all_it_does() -> None:
    """Steps without drafts, the only ones of late, take half as long again: so will one that
    drafts, and when both recover both are cheap again."""
    cost, plain, draft = StepCost(), Work(2, 2, 0), Work(2, 16, 16)
    for work, pace, times in ((plain, 1.0, 9), (draft, 1.0, 9), (plain, 1.5, 40)):
        for _ in range(times):
            cost.observe(work, pace * two_cores(work))
    assert cost.near(2).seconds(draft) == pytest.approx(1.5 * two_cores(draft), rel=0.03)
    for _ in range(9):
        cost.observe(draft, two_cores(draft))
    assert cost.near(2).seconds(plain) == pytest.approx(two_cores(plain), rel=0.03)


def test_steps_that_cannot_be_measured() -> None:
    """Prompts in every step, for as long as one likes: there is a plan, of first steps again and
    again."""
    controller = Controller(7, 8)
    for _ in range(50):
        assert controller.plan(["a", "b"]).why == "first"
        controller.observe(None, 0.0, {})


def test_a_step_whose_kernels_are_made_tells_nothing_of_its_kind() -> None:
    """The first step with so many rows takes three times as long as those after it."""
    cost, work = StepCost(), Work(4, 4, 0)
    for factor in (3.0, 1.0, 1.0):
        cost.observe(work, factor * two_cores(work))
    assert cost.near(4).seconds(work) == pytest.approx(two_cores(work), rel=0.01)


def test_acceptance_is_conditional() -> None:
    """A position counts only where it was reached: two of three accepted say nothing about a
    fourth."""
    acceptance = Acceptance(4)
    for _ in range(400):
        acceptance.observe("a", verified=3, accepted=2)
    first, second, third, fourth = acceptance.rates("a")
    assert min(first, second) > 0.98
    assert third < 0.02
    assert fourth == pytest.approx(0.6), "the prior"
    assert acceptance.lengths(["a"], 4, 0.5, None) == {"a": 2}


def test_groups_are_learned_apart() -> None:
    """What sampled requests reject says nothing of greedy ones; a batch of both is expected to do
    as its parts, by their numbers."""
    acceptance = Acceptance(2, group=lambda name: name[0])
    for _ in range(100):
        for name, accepted in (("s1", 0), ("g1", 2)):
            acceptance.lengths([name], 2, 0.0, {name: [0.7, 0.7]})
            acceptance.observe(name, 2, accepted, [0.7, 0.7])
        acceptance.forget({"s1", "g1"})
    assert acceptance.survival("s2", 1, [0.7])[0] < 0.1
    assert acceptance.survival("g2", 1, [0.7])[0] > 0.9
    for name in ("s2", "g2"):
        acceptance.lengths([name] * 64, 2, 0.0, {name: [0.7, 0.7]})
    first = acceptance.expected(["s2", "s3", "s4", "g2"])[:, 0]
    assert (first > 0.9).mean() == pytest.approx(0.25)
    assert (first < 0.1).mean() == pytest.approx(0.75)
    assert acceptance.expected(["new"]).tolist() == [pytest.approx([0.6, 0.36])], "the prior"


def test_a_kind_of_request_that_is_new_is_weighed_at_once() -> None:
    """The plan stands while nothing is learned; the first, second, fourth ... draft of a group has
    it made anew."""
    controller = Controller(2, 3, group=lambda name: name[0])
    for step in range(200):
        plan = controller.plan(["a"])
        work = Work(1, 1 + plan.num_draft_tokens, 3 if plan.num_draft_tokens else 0)
        controller.observe(
            work, two_cores(work), {"a": (plan.num_draft_tokens, plan.num_draft_tokens)}
        )
        if step > 100 and controller.kept_plan(1) is not None:
            break
    assert controller.kept_plan(1) is not None
    assert controller.kept_plan(2) is None, "another number of requests"
    controller.observe(None, 0.0, {"b": (2, 0)})
    assert controller.kept_plan(1) is None


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
    acceptance, requests = Acceptance(7), [f"r{i}" for i in range(16)]
    confidences = {
        name: [0.99 - 0.05 * i - 0.001 * n for i in range(7)] for n, name in enumerate(requests)
    }
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        lengths = acceptance.lengths(requests, 7, threshold, confidences)
        rows = len(requests) + sum(lengths.values())
        assert rows == round_rows(rows)
        survival = {name: acceptance.survival(name, 7, confidences[name]) for name in requests}
        kept = [p for name in requests for p in survival[name][: lengths[name]]]
        left = [p for name in requests for p in survival[name][lengths[name] :]]
        assert not kept or not left or min(kept) >= max(left)
    assert sum(acceptance.lengths(requests, 7, 0.0, confidences).values()) == 7 * 16, (
        "all where all pay"
    )

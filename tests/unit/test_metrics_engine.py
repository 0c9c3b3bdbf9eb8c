"""What the engine's metrics make of steps, apart from an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from step_records import ran_of, scheduled_of, scheduler_of
from vllm_dflash.metrics import catalog
from vllm_dflash.metrics.outcomes import Outcomes
from vllm_dflash.metrics.times import StepTimes
from vllm_dflash.request_limits import Limits
from vllm_dflash.steps import Step, Steps


class Watching:
    """Both, as the engine's record has them."""

    what = "a test"

    def __init__(self, scheduler: Any, adaptive: bool = True, **more: Any) -> None:
        self.scheduler = scheduler
        self.outcomes = Outcomes(3, 4, max_model_len=300, adaptive=adaptive, **more)
        self.times = StepTimes(None)

    def observe(self, step: Step) -> None:
        self.outcomes.observe(step, self.scheduler.finished_req_ids)
        if step.num_requests:
            self.times.observe(step)

    def close(self) -> None:
        raise AssertionError("it failed")


def watch(
    scheduler: Any, *steps: tuple[Any, Any], adaptive: bool = True, **more: Any
) -> dict[str, Any]:
    """The samples after some steps."""
    record, watching = Steps(scheduler), Watching(scheduler, adaptive, **more)
    record.add(watching)
    schedule, update = (
        record.around_schedule(scheduler.schedule),
        record.around_update(scheduler.update),
    )
    for scheduled, ran in steps:
        schedule()
        update(scheduled, ran)
    return watching.outcomes.samples() | watching.times.samples()


def speculative(k: int = 3) -> tuple[Any, Any]:
    """``a`` has three draft tokens, two right; ``b`` three, of which a grammar forbids two, and
    none right; ``c`` has none."""
    return scheduled_of(
        {"a": 4, "b": 4, "c": 1},
        k=k,
        drafts={"a": [7, 8, 9], "b": [1, -1, -1]},
        num_invalid_spec_tokens={"b": 2},
    ), ran_of({"a": [7, 8, 4], "b": [5], "c": [6]})


def said(**what: dict[str, Any]) -> Limits:
    limits = Limits(3)
    vars(limits).update(what)
    return limits


def plain(k: int = 0) -> tuple[Any, Any]:
    return scheduled_of({"a": 1, "b": 1}, k=k, num_output_tokens=[20, 20]), ran_of(
        {"a": [1], "b": [1]}
    )


def test_what_becomes_of_drafts() -> None:
    scheduler = scheduler_of(
        {"a": 20, "b": 250, "c": 20}, confidences={"a": [0.95, 0.5, 0.2], "b": [0.31, 0.9, 0.9]}
    )
    found = watch(scheduler, speculative())
    assert found["verified_tokens"] == [(["1"], 2), (["2"], 1), (["3"], 1)]
    assert found["reached_tokens"] == [(["1"], 2), (["2"], 1), (["3"], 1)]
    assert found["accepted_tokens"] == [(["1"], 1), (["2"], 1), (["3"], 0)]
    assert found["output_tokens"] == [(["prefill"], 0), (["speculative"], 4), (["plain"], 1)]
    assert found["accepted_length"][0][1][1] == 3 + 1
    assert found["context_verifications"] == [
        (["0-255", "false"], 2),
        (["0-255", "true"], 0),
        (["256-1023", "false"], 0),
        (["256-1023", "true"], 0),
    ]
    assert found["context_committed_tokens"][0] == (["0-255", "false"], 3 + 1)
    assert [count for _, count in found["confidence_tokens"]] == [0, 0, 1, 1, 0, 1, 0, 0, 0, 1]
    assert [count for _, count in found["confidence_accepted_tokens"]] == [
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        1,
    ]
    assert [(labels, counts[0][:-1].count(0)) for labels, counts in found["step_seconds"]][1][
        0
    ] == ["speculative"]
    assert (
        sum(sum(counts[0]) for _, counts in found["step_seconds"])
        == sum(found["step_seconds"][1][1][0])
        == 1
    )


@pytest.mark.parametrize(
    ("adaptive", "k", "tokens", "grammar", "reason"),
    [
        (True, 0, 20, False, "controller"),
        (False, 0, 20, False, "batch_size"),
        (True, 3, 20, False, "controller"),
        (False, 3, 20, False, "other"),
        (False, 3, 296, False, "max_model_len"),
        (False, 3, 20, True, "grammar"),
    ],
)
def test_why_there_was_no_draft(
    adaptive: bool, k: int, tokens: int, grammar: bool, reason: str
) -> None:
    scheduler = scheduler_of({"a": tokens})
    scheduler.requests["a"].use_structured_output = grammar
    step = scheduled_of({"a": 1}, k=k, num_output_tokens=[tokens]), ran_of({"a": [1]})
    first = scheduled_of({"a": 3}, k=k), ran_of({"a": []})
    assert watch(scheduler, first, step, adaptive=adaptive)["speculation_refused"] == [
        ([reason], 1)
    ]


@pytest.mark.parametrize("k", [0, 3])
def test_requests_whose_users_want_no_drafts_say_so(k: int) -> None:
    """Also in a step in which others have drafts, and one that is not looked at by request."""
    found = watch(
        scheduler_of({"a": 20, "b": 20}),
        *[plain(k)] * 2,
        adaptive=False,
        limits=said(by_request={"a": 0, "b": 2}),
    )
    refused = {labels[0]: count for labels, count in found["speculation_refused"]}
    assert refused == {"request": 2, "other": 2 if k else 1} | ({} if k else {"batch_size": 1})


def test_classes_of_prompts() -> None:
    """Two tokens of a draft of ``a`` are accepted, none of ``b``; so many classes are shown, and
    the rest is one."""
    limits = said(classes={"a": "code", "b": "chat"})
    found = watch(scheduler_of({"a": 20, "b": 20, "c": 20}), *[speculative()] * 2, limits=limits)
    assert found["prompt_class_verifications"] == [(["chat"], 2), (["code"], 2)]
    assert found["prompt_class_committed_tokens"] == [(["chat"], 2), (["code"], 6)]
    outcomes = Outcomes(3, 4, 300, False)
    for i in range(2 * catalog.MOST_CLASSES):
        outcomes._count_class(f"c{i}", 2)
    assert len(outcomes.prompt_class) == catalog.MOST_CLASSES + 1
    assert outcomes.prompt_class["other"] == [catalog.MOST_CLASSES, 2 * catalog.MOST_CLASSES]


def test_plain_steps_count_the_same_however_they_are_read() -> None:
    """A connector may keep ended requests, so with one each is looked at; the first step of the
    others is too."""
    at_once, each = (
        watch(scheduler_of({"a": 20, "b": 20}, connector=connector), *[plain()] * 4, adaptive=False)
        for connector in (None, object())
    )
    reasons = {labels[0]: count for labels, count in at_once.pop("speculation_refused")}
    assert reasons == {"other": 2, "batch_size": 6}
    assert reasons == {labels[0]: count for labels, count in each.pop("speculation_refused")}
    # A step that a busy machine held up is no measurement: these may be absent.
    times = [
        found.pop(name, None)
        for found in (at_once, each)
        for name in ("step_seconds", "measured_seconds", "baseline_seconds", "estimated_speedup")
    ]
    assert [sum(counts) for (counts, _) in (sample for _, sample in times[0])] == [0, 0, 0, 4]
    assert at_once == each
    assert at_once["draft_length"][0][1][0][0] == 8
    assert at_once["output_tokens"][2] == (["plain"], 8)


def test_a_request_that_ends_has_a_mean_and_one_without_drafts_has_none() -> None:
    scheduler = scheduler_of({"a": 20, "b": 20, "c": 20})
    new = scheduled_of({"a": 5, "c": 5}, k=3, new=["a", "c"]), ran_of({"a": [1], "c": [1]})
    scheduler.finished_req_ids = set()
    steps = [new, speculative()]
    last = scheduled_of({"b": 1}, k=3, finished_req_ids={"a", "c"}), ran_of({"b": [1]})
    found = watch(scheduler, *steps, last)
    counts, total = found["request_accepted_length"][0][1]
    assert (sum(counts), total) == (1, 3.0)


def test_an_id_that_comes_again_in_the_step_after_its_end_is_another_request() -> None:
    """The end before took the new request's own count away."""
    scheduler = scheduler_of({"a": 20, "b": 20, "c": 20})
    again = scheduled_of({"a": 5}, k=3, new=["a"], finished_req_ids={"a"}), ran_of({"a": [1]})
    scheduler.finished_req_ids = set()
    again[0].scheduled_new_reqs[0].num_computed_tokens = 16
    found = watch(scheduler, again, speculative())
    counts = {tuple(labels): count for labels, count in found["context_verifications"]}
    assert {cached for (_, cached), count in counts.items() if count} == {"true", "false"}


def step(kind: str, seconds: float, committed: int = 1) -> Step:
    """One of one request, that took so long."""
    k = 0 if kind == "plain" else 3
    found = Step(
        scheduled_of({"a": 1}, k=k, num_output_tokens=[3]), k, 10.0, 10.0, after_pause=False
    )
    found.num_requests, found.all_decode, found.ended = 1, True, 10.0 + seconds
    found.verified = {"a": (3, committed - 1)} if kind == "speculative" else {}
    found.outputs = {
        0: SimpleNamespace(outputs=[SimpleNamespace(request_id="a", new_token_ids=[1] * committed)])
    }
    return found


def test_the_speed_up_is_against_the_median_of_plain_steps() -> None:
    times = StepTimes(None)
    for seconds in (0.01, 0.05, 0.01):
        times.observe(step("plain", seconds))
    assert times.speedup.recent is None
    for _ in range(5):
        times.observe(step("speculative", 0.02, committed=4))
    assert times.speedup.recent == pytest.approx(4 * 0.01 / 0.02)
    times.observe(step("speculative", 0.2))  # held up from outside
    assert times.speedup.recent == pytest.approx(4 * 0.01 / 0.02)
    assert times.samples()["estimated_speedup"][0][0] == ["plain_steps"]


def test_a_cost_model_is_asked_again_after_a_while() -> None:
    asked: list[int] = []

    def model(num_reqs: int) -> float | None:
        asked.append(num_reqs)
        return None if len(asked) == 1 else 0.01

    times = StepTimes(model)
    for _ in range(140):
        times.observe(step("partial", 0.01))
    assert len(asked) == 3  # at once, soon as it did not know, and when its answer was old
    assert times.samples()["estimated_speedup"][0][0] == ["cost_model"]

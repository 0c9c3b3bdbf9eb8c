"""The record of a step, by hand, and that whoever watches disturbs neither vLLM nor the others."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from step_records import ran_of, scheduled_of, scheduler_of
from vllm_dflash.steps import Step, Steps


@dataclass
class Seen:
    """An observer that keeps what it is given."""

    what: str = "a test"
    steps: list[Step] = field(default_factory=list)
    closed: int = 0

    def observe(self, step: Step) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


class Failing(Seen):
    def observe(self, step: Step) -> None:
        super().observe(step)
        raise RuntimeError("broken")


def watched(scheduler: Any, *observers: Seen) -> Any:
    """``update_from_output`` of a scheduler that is watched."""
    steps = Steps(scheduler)
    for observer in observers:
        steps.add(observer)
    scheduler.schedule = steps.around_schedule(scheduler.schedule)
    scheduler.shutdown = steps.around_shutdown(scheduler.shutdown)
    scheduler.update = steps.around_update(scheduler.update)
    return scheduler


def test_a_step_with_all_kinds_of_requests() -> None:
    """A prompt's, drafts with and without tokens that a grammar forbids, a bare one, ended ones,
    one whose prompt is computed again."""
    outputs = {"prompt": 0, "drafted": 5, "cut": 5, "bare": 5, "ended": 9, "resumed": 3, "lost": 4}
    scheduler = scheduler_of(outputs, ended={"ended"}, room={"drafted": 2})
    scheduled = scheduled_of(
        {
            "prompt": 30,
            "drafted": 4,
            "cut": 4,
            "bare": 1,
            "ended": 4,
            "resumed": 20,
            "gone": 1,
            "lost": 3,
        },
        drafts={"drafted": [7, 8, 9], "cut": [7, -1, -1], "ended": [1, 2, 3], "lost": [1, 2]},
        k=7,
        num_invalid_spec_tokens={"cut": 2},
    )
    sampled = {
        "prompt": [1],
        "drafted": [7, 8, 4],
        "cut": [5],
        "bare": [2],
        "ended": [5],
        "resumed": [6],
        "lost": [],
    }
    watched(scheduler, seen := Seen()).update(scheduled, ran_of(sampled))
    [step] = seen.steps
    assert step.verified == {"drafted": (3, 2), "cut": (1, 0)}
    assert step.undrafted == ["bare", "lost"]
    assert step.requests == {name: scheduler.requests[name] for name in outputs if name != "ended"}
    assert (step.num_requests, step.num_ended, step.num_drafted, step.num_planned) == (6, 2, 7, 7)
    assert (step.is_plain, step.all_decode) == (False, False)
    assert step.committed["drafted"] == 2  # of three tokens there was room for two
    assert step.num_committed == 1 + 2 + 1 + 1 + 1


def test_what_vllm_pads_a_request_with_is_no_draft() -> None:
    """One whose context came from a cache or a connector, and that was resumed: they counted as
    drafts of which the first token was wrong."""
    scheduler = watched(scheduler_of({"new": 0, "resumed": 5, "old": 5}), seen := Seen())
    names = ["new", "resumed", "old"]
    scheduled = scheduled_of(
        dict.fromkeys(names, 4),
        drafts={name: [-1, -1, -1] for name in names},
        k=3,
        new=["new"],
        resumed=["resumed"],
    )
    scheduler.update(scheduled, ran_of({"new": [1], "resumed": [1], "old": [1]}))
    [step] = seen.steps
    assert step.verified == {"old": (3, 0)}
    assert (step.undrafted, step.all_decode) == (["resumed"], False)


def test_a_step_of_nothing_decodes_nothing() -> None:
    watched(scheduler_of({}), seen := Seen()).update(scheduled_of({}, k=0), ran_of({}))
    assert (seen.steps[0].num_requests, seen.steps[0].all_decode, seen.steps[0].is_plain) == (
        0,
        False,
        False,
    )


def plain_steps(**changed: Any) -> list[Step]:
    """Two steps with K = 0 of two requests that decode, the second one changed; only with the
    second is it known that none drafts."""
    scheduler = watched(
        scheduler_of({"a": 3, "b": 4}, **changed.pop("scheduler", {})), seen := Seen()
    )
    given = {"counts": {"a": 1, "b": 1}, "k": 0, "num_output_tokens": [3, 4]}
    for each in (given, given | changed):
        scheduler.schedule()
        counts = each["counts"]
        scheduler.update(scheduled_of(**each), ran_of({name: [1] for name in counts}))
    return seen.steps


def test_a_plain_step_is_known_without_looking_at_its_requests() -> None:
    first, second = plain_steps()
    assert (first.is_plain, list(first.requests), first.undrafted, first.all_decode) == (
        False,
        ["a", "b"],
        ["a", "b"],
        True,
    )
    assert (second.is_plain, list(second.requests), second.undrafted, second.all_decode) == (
        True,
        [],
        (),
        True,
    )
    assert (first.num_expected, second.num_expected) == (1, 0)
    assert (second.num_requests, second.num_committed, second.num_ended) == (2, 2, 0)
    assert first.num_context == second.num_context == 3 + 4 + 2
    assert dict(second.committed) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": {"a": 1, "b": 2}},
        {"counts": {"a": 1, "gone": 1}},
        {"drafts": {"a": [5]}, "counts": {"a": 2, "b": 1}},
        {"num_output_tokens": [3, 0]},
        {"new": ["b"]},
        {"scheduler": {"connector": object()}},
    ],
    ids=[
        "a prompt",
        "one has ended",
        "a draft",
        "the end of a prompt",
        "a new one",
        "ended ones may still be there",
    ],
)
def test_whatever_is_not_plain_is_looked_at(changed: dict[str, Any]) -> None:
    step = plain_steps(**changed)[1]
    assert not step.is_plain
    assert step.num_requests == len(step.requests) > 0


def test_033_says_by_skip_drafts_that_none_is_drafted() -> None:
    watched(scheduler_of({"a": 3}), seen := Seen()).update(
        scheduled_of({"a": 1}, k=7, skip_drafts=True), ran_of({"a": [1]})
    )
    assert (seen.steps[0].num_drafted, seen.steps[0].num_planned) == (0, 7)


def test_times_of_steps() -> None:
    """A step is from the end of the one before; after a pause from when there was work again,
    however often that is looked for."""
    scheduler = watched(scheduler_of({"a": 3}), seen := Seen())
    for running in ([1], [], []):
        for _ in range(2):
            scheduler.schedule()
        scheduler.running = running
        scheduler.update(scheduled_of({"a": 1}, k=0), ran_of({"a": [1]}))
    first, second, third = seen.steps
    assert first.began is not None
    assert third.began is not None
    assert first.after_pause
    assert first.began < first.scheduled_at < first.ended
    assert (second.after_pause, second.began) == (False, first.ended)
    assert third.after_pause
    assert second.ended < third.began < third.scheduled_at


def test_confidences_are_those_that_our_scheduler_keeps() -> None:
    known = {"a": [0.9, 0.5]}
    for scheduler, confidences in (
        (scheduler_of({"a": 3}), None),
        (scheduler_of({"a": 3}, confidences=known), known),
    ):
        watched(scheduler, seen := Seen()).update(
            scheduled_of({"a": 3}, k=7, drafts={"a": [5, 6]}), ran_of({"a": [1]})
        )
        assert seen.steps[0].confidences is confidences


def test_an_observer_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "vllm_dflash.steps.logger.exception", lambda text, *args: said.append(text % args)
    )
    before, broken, after = Seen(), Failing("the broken one"), Seen()
    scheduler = watched(scheduler_of({"a": 3}), before, broken, after)
    for _ in range(3):
        outputs = scheduler.update(scheduled_of({"a": 1}, k=7), ran_of({"a": [1]}))
        assert [o.new_token_ids for o in outputs[0].outputs] == [[1]]
    assert [len(each.steps) for each in (before, broken, after)] == [3, 1, 3]
    assert (broken.closed, before.closed) == (1, 0)
    assert said == ["the broken one: ended here, as it failed; serving goes on"]


def test_a_step_that_cannot_be_read_ends_all_observers_and_is_served() -> None:
    scheduler = watched(scheduler_of({"a": 3}), one := Seen(), other := Seen())
    for _ in range(2):
        assert scheduler.update(SimpleNamespace(num_scheduled_tokens={"a": 1}), ran_of({"a": [1]}))
    assert [(len(each.steps), each.closed) for each in (one, other)] == [(0, 1)] * 2


def test_vllms_own_errors_are_vllms() -> None:
    scheduler = scheduler_of({"a": 3})
    scheduler.update = lambda *_: {}["nothing"]
    watched(scheduler, seen := Seen())
    with pytest.raises(KeyError, match="nothing"):
        scheduler.update(scheduled_of({"a": 1}, k=7), ran_of({"a": [1]}))
    assert (seen.steps, seen.closed) == ([], 0)


def test_an_engine_that_ends_closes_all() -> None:
    scheduler = watched(scheduler_of({"a": 3}), one := Seen(), other := Seen())
    scheduler.shutdown()
    scheduler.shutdown()
    assert (one.closed, other.closed) == (1, 1)

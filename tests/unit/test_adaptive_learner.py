"""What the controller gets of each step, apart from an engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from step_records import ran_of, scheduled_of, scheduler_of
from vllm_dflash.adaptive.controller import Plan
from vllm_dflash.adaptive.learner import Learner
from vllm_dflash.drafts import Planned
from vllm_dflash.steps import Step, Steps, Work


@dataclass
class Controller:
    """Keeps what it is to learn from."""

    max_draft: int = 7
    block_size: int = 8
    seen: list[Any] = field(default_factory=list)
    pending: bool = True

    def measures(self, plan: Plan) -> bool:
        return self.pending or plan.why == "trial"

    def observe(
        self,
        work: Work | None,
        seconds: float,
        outcomes: Any,
        confidences: Any,
        plan: Plan,
        writes_backlog: bool,
    ) -> None:
        self.seen.append((work, seconds, outcomes, confidences, plan.why, writes_backlog))


def learn(*steps: tuple[Any, Any], **how: Any) -> list[Any]:
    """What a controller gets of steps that are scheduled and ran one after the other."""
    seen: list[Any] = controller_of(*steps, **how).seen
    return seen


def controller_of(
    *steps: tuple[Any, Any],
    synchronous: bool = True,
    why: str = "best",
    pending: bool = True,
    **attributes: Any,
) -> Any:
    """The controller that got it."""
    scheduler = scheduler_of({"a": 3, "b": 4}, **attributes)
    controller: Any = Controller(pending=pending)
    record, learner = Steps(scheduler), Learner(controller, synchronous)
    record.add(learner)
    learner.plan = Plan(0, why=why)
    schedule, update = (
        record.around_schedule(scheduler.schedule),
        record.around_update(scheduler.update),
    )
    for scheduled, ran in steps:
        schedule()
        update(scheduled, ran)
    return controller


def plain(k: int = 0, **changed: Any) -> tuple[Any, Any]:
    return scheduled_of({"a": 1, "b": 1}, k=k, num_output_tokens=[3, 4], **changed), ran_of(
        {"a": [1], "b": [1]}
    )


SPECULATIVE = (
    scheduled_of(
        {"a": 4, "b": 3},
        k=7,
        num_output_tokens=[3, 4],
        drafts={"a": [7, 8, 9], "b": [1, 2]},
        num_invalid_spec_tokens={"b": 1},
    ),
    ran_of({"a": [7, 8, 4], "b": [5]}),
)
PROMPT = scheduled_of({"a": 1, "b": 9}, k=7, num_output_tokens=[3]), ran_of({"a": [1], "b": [1]})


@pytest.mark.parametrize(
    ("last_end", "scheduled_at", "began"),
    [(1.0, 1.01, 1.0), (1.0, 4.0, 4.0), (None, 4.0, 4.0)],
    ids=["a short gap is part of it", "a wait is not", "the first after idling"],
)
def test_where_a_step_began(last_end: float | None, scheduled_at: float, began: float) -> None:
    # After idling there was work when it was first scheduled, or before.
    step = Step(plain()[0], 0, scheduled_at, last_end or 3.9, last_end is None)
    step.ended = scheduled_at + 0.1
    assert step.decoding_began(is_synchronous=True) == began


def test_an_asynchronous_step_began_when_the_one_before_ended_and_tells_nothing_after_idling() -> (
    None
):
    seen = learn(SPECULATIVE, SPECULATIVE, synchronous=False)
    assert [work is None for work, *_ in seen] == [True, False]
    assert seen[1][1] > 0


def test_an_asynchronous_steps_time_holds_the_draft_of_the_step_before() -> None:
    """Its output is handed on before its own draft runs."""
    seen = learn(plain(), plain(k=7), SPECULATIVE, plain(), synchronous=False, why="trial")
    assert [work and work.draft_rows for work, *_ in seen] == [None, 0, 16, 16]
    assert not any(writes_backlog for *_, writes_backlog in seen)


def test_a_step_that_drafts_for_some_requests() -> None:
    """Of the others neither rows nor contexts count for the drafter."""
    step, ran = SPECULATIVE
    scheduled = SimpleNamespace(
        **vars(step) | {"num_spec_tokens_to_schedule": Planned(7, ["a", "gone"])}
    )
    [(work, *_)] = learn((scheduled, ran))
    assert work == Work(2, 7, 8, 14, 49, 8 * (4 + 3))


def test_a_speculative_step() -> None:
    known = {"a": [0.9, 0.8, 0.7]}
    [(work, seconds, outcomes, confidences, why, writes_backlog)] = learn(
        SPECULATIVE, confidences=known
    )
    assert work == Work(
        num_reqs=2,
        num_tokens=7,
        draft_rows=16,
        num_context=3 + 4 + 7,
        attended=4 * (3 + 4) + 3 * (4 + 3),
        draft_attended=8 * (3 + 4 + 7),
    )
    assert seconds > 0
    assert outcomes == {"a": (3, 2), "b": (1, 0)}
    assert confidences is known
    assert (why, writes_backlog) == ("best", True)


@pytest.mark.parametrize(
    "step", [PROMPT, plain(), plain(k=7)], ids=["a prompt", "no draft", "the first draft"]
)
def test_no_outcomes_where_nothing_is_verified(step: tuple[Any, Any]) -> None:
    [(_, _, outcomes, _, _, _)] = learn(step, why="trial")
    assert outcomes == {}


def test_a_step_with_a_prompt_or_an_ended_request_tells_no_cost() -> None:
    [(work, *_)] = learn(PROMPT)
    assert work is None
    [(work, _, outcomes, *_)] = learn(SPECULATIVE, ended={"b"})
    assert (work, outcomes) == (None, {"a": (3, 2)})


def test_a_step_of_nothing_is_none() -> None:
    """vLLM runs one to hand on that the last request has ended: the controller failed there once,
    by the logarithm of no request."""
    nothing = scheduled_of({}, k=7), ran_of({})
    assert [work for work, *_ in learn(nothing)] == [None]
    assert [work is None for work, *_ in learn(SPECULATIVE, nothing)] == [False, True]


def test_a_step_is_taken_with_the_plan_that_it_was_scheduled_with() -> None:
    """Under asynchronous scheduling the next one is planned before it has run; one that never ran
    is passed over."""
    controller = Controller()
    learner: Any = Learner(controller, is_synchronous=False)  # type: ignore[arg-type]
    first, lost, second, unknown = (scheduled_of({}, k=7) for _ in range(4))
    for scheduled, why in ((first, "trial"), (lost, "best"), (second, "trial")):
        learner.schedule(scheduled, Plan(7, why=why))
    learner.plan = Plan(0, why="other")
    for step in (first, second, unknown):
        learner.observe(Step(step, 7, 0.0, None, False))
    assert [seen[4] for seen in controller.seen] == ["trial", "trial", "other"]


def test_steps_that_tell_nothing_are_passed_over() -> None:
    """Those whose times are of no use, and that verified nothing; what became of drafts is always
    learned."""
    assert [work for work, *_ in learn(*[plain()] * 9)] == [Work(2, 2, 0, 9, 9, 0)] * 9
    assert learn(*[plain()] * 9, pending=False) == []
    assert len(learn(*[plain()] * 9, pending=False, why="trial")) == 9
    [(work, _, outcomes, *_)] = learn(plain(), SPECULATIVE, pending=False)
    assert (work, outcomes) == (None, {"a": (3, 2), "b": (1, 0)})


def test_the_first_step_that_drafts_again_catches_up() -> None:
    assert [
        seen[-1] for seen in learn(plain(k=7), plain(k=7), plain(), plain(k=7), why="trial")
    ] == [True, False, False, True]


def test_033_drafts_nothing_where_it_says_so() -> None:
    [(work, *_, writes_backlog)] = learn(plain(k=7, skip_drafts=True), why="trial")
    assert (work, writes_backlog) == (Work(2, 2, 0, 9, 9, 0), False)

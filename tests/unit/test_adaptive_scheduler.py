"""Our scheduler where its controller has failed, or could not watch: as without one, apart from an
engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.learner import Learner
from vllm_dflash.adaptive.scheduler import AdaptiveAsyncScheduler, AdaptiveScheduler
from vllm_dflash.drafts import Drafts, skipped_of

pytestmark = pytest.mark.vllm


def _scheduled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """K of each step that reaches vLLM's own schedulers."""
    taken: list[Any] = []
    for theirs in (Scheduler, AsyncScheduler):
        monkeypatch.setattr(
            theirs,
            "_update_after_schedule",
            lambda self, output: taken.append(output.num_spec_tokens_to_schedule),
        )
    return taken


@pytest.mark.parametrize("ours", [AdaptiveScheduler, AdaptiveAsyncScheduler])
def test_without_a_controller_drafts_are_whole(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """K stays as vLLM has it, nothing is asked of the controller, and drafts go to vLLM as they
    came."""
    taken = _scheduled(monkeypatch)
    monkeypatch.setattr(
        Scheduler, "update_draft_token_ids", lambda self, ids: taken.append(ids.draft_token_ids)
    )
    scheduler = ours.__new__(ours)
    scheduler.controller, scheduler._confidences = None, {"a": [0.5]}
    scheduler._learner = Learner(Controller(7, 8), scheduler._is_synchronous)
    scheduler._learner.close()
    scheduler._update_after_schedule(SimpleNamespace(num_spec_tokens_to_schedule=7))
    assert (scheduler.plan.num_draft_tokens, scheduler.plan.threshold, scheduler.confidences) == (
        7,
        0.0,
        None,
    )
    scheduler.update_draft_token_ids(DraftTokenIds(["a"], [[1, 2, 3]]))
    assert taken == [7, [[1, 2, 3]]]


@pytest.mark.parametrize("ours", [AdaptiveScheduler, AdaptiveAsyncScheduler])
def test_a_controller_that_fails_while_it_plans_ends_alone(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the engine with it: what was measured is learned when the next step is planned."""
    taken = _scheduled(monkeypatch)
    scheduler = ours.__new__(ours)
    scheduler.controller, scheduler._confidences = None, {}
    scheduler._learner = Learner(Controller(7, 8), scheduler._is_synchronous)
    output = SimpleNamespace(num_spec_tokens_to_schedule=7)
    monkeypatch.setattr(
        ours, "_choose", lambda self, output: setattr(output, "num_spec_tokens_to_schedule", 1 / 0)
    )
    for _ in range(2):
        scheduler._update_after_schedule(output)
    assert scheduler._learner.is_closed
    assert (scheduler.plan.num_draft_tokens, taken) == (7, [7, 7])


@pytest.mark.parametrize("skips", [True, False])
def test_what_is_skipped_goes_to_the_worker_with_k(skips: bool) -> None:
    """Only where the drafts come back as lists: elsewhere a block is computed for all."""
    scheduler = AdaptiveScheduler.__new__(AdaptiveScheduler)
    planned: list[Plan] = []
    plan = Plan(7, skipped=frozenset(["b", "gone"]))
    scheduler.controller = SimpleNamespace(kept_plan=lambda num_reqs: plan)
    scheduler._learner = SimpleNamespace(schedule=lambda output, plan: planned.append(plan))
    scheduler._skips = skips
    output = SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1, "c": 1},
        total_num_scheduled_tokens=3,
        scheduled_new_reqs=[],
        scheduled_spec_decode_tokens={},
        num_spec_tokens_to_schedule=7,
        finished_req_ids=set(),
    )
    scheduler._choose(output)
    assert output.num_spec_tokens_to_schedule == 7
    assert skipped_of(output.num_spec_tokens_to_schedule) == (frozenset("b") if skips else set())
    assert planned == [plan]


def test_drafts_of_some_requests_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one has none."""
    taken: list[Any] = []
    monkeypatch.setattr(
        Scheduler, "update_draft_token_ids", lambda self, ids: taken.append(ids.draft_token_ids)
    )
    scheduler = AdaptiveScheduler.__new__(AdaptiveScheduler)
    scheduler.controller, scheduler._confidences = Controller(3, 4), {}
    scheduler._learner = Learner(scheduler.controller, True)
    scheduler._learner.plan = Plan(3, -1.0)
    drafts = Drafts([[], [1, 2, 3]], [[], [0.9, 0.8, 0.7]])
    scheduler.update_draft_token_ids(DraftTokenIds(["a", "b"], drafts))
    assert taken == [[[], [1, 2, 3]]]
    scheduler.update_draft_token_ids(DraftTokenIds(["a", "b"], Drafts([[], []])))
    assert len(taken) == 1
    assert list(scheduler.controller.acceptance._of("b").group.recent)[1:] == [[0.9, 0.8, 0.7]]

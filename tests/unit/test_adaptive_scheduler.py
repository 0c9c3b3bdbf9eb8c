"""When a step began that the controller learns from, apart from an engine."""

import pytest

pytest.importorskip("vllm")
from vllm_dflash.adaptive.scheduler import AdaptiveScheduler

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("last_end", "scheduled_at", "began"),
    [(1.0, 1.01, 1.0), (1.0, 4.0, 4.0), (None, 4.0, 4.0)],
    ids=["a short gap is part of it", "a wait is not", "the first after idling"],
)
def test_where_a_step_began(last_end: float | None, scheduled_at: float, began: float) -> None:
    scheduler = AdaptiveScheduler.__new__(AdaptiveScheduler)
    scheduler._last_end, scheduler._scheduled_at = last_end, scheduled_at
    assert scheduler._began(scheduled_at + 0.1) == began

"""What the controller makes of drafting, for people: whether it drafts, why, and until when. Pure.

pytest tests/unit/test_adaptive_stale.py
"""

from dataclasses import dataclass
from typing import Any

from vllm_dflash.adaptive.controller import Controller
from vllm_dflash.cost_profile import power
from vllm_dflash.steps import Work


@dataclass(frozen=True)
class Status:
    """What the controller makes of drafting, for people."""

    drafting: bool
    why: str
    """``first``: nothing was chosen yet; ``pays``; ``slow``: would not pay if every draft token was
    accepted; ``rejected``: too few are."""
    measured: float | None = None
    """When a step that drafts was last measured at this batch size, on ``time.monotonic``'s
    clock."""
    next_trial: float | None = None
    """Where nothing is drafted: seconds of decoding until drafting is tried again, if all goes on
    as now."""


def status_of(controller: Controller) -> Status:
    """What was chosen last, and why."""
    best, num_reqs, now = controller.best, controller.num_reqs, controller.now
    if best is None:
        return Status(drafting=True, why="first")
    measured = controller.cost.measured.get((power(num_reqs), True))
    if best.num_draft_tokens:
        return Status(drafting=True, why="pays", measured=measured)
    steps = max(max(now.trial, now.choice) - now.steps, 0)
    whole = num_reqs * (controller.max_draft + 1), num_reqs * controller.block_size
    seconds = controller.cost.seconds(Work(num_reqs, *whole))
    why = "slow" if whole[0] < best.rate * seconds else "rejected"
    return Status(False, why, measured, steps * best.seconds)


def drafting_samples(status: Status, now: float) -> dict[str, list[Any]]:
    """What the controller makes of drafting, ``now`` on ``time.monotonic``'s clock."""
    found: dict[str, list[Any]] = {"drafting": [([status.why], int(status.drafting))]}
    if status.measured is not None:
        found["draft_measured_age_seconds"] = [([], now - status.measured)]
    if status.next_trial is not None:
        found["next_trial_seconds"] = [([], status.next_trial)]
    return found

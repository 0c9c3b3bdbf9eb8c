"""Medians with their spread, ratios of paired runs, and acceptance by position. Pure, standard
library only.

pytest tests/unit/test_bench_statistics.py
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.acceptance import Positions, tau

EARLY_STEPS = 200
"""Steps of a run that are also looked at by themselves: what learns has not learned yet."""


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """None where a repeat has no figure, as plain decoding has no tau."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` (0 to 1) of the values lie, linear between two; None of
    none."""
    if not values:
        return None
    ordered, at = sorted(values), share * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def paired_ratio(
    runs: Mapping[int, float | None], base: Mapping[int, float | None]
) -> Spread | None:
    """The spread of ``runs[r] / base[r]`` over the repeats r that both have: what slows a repeat
    down slows both."""
    ratios: list[float | None] = []
    for repeat, value in runs.items():
        other = base.get(repeat)
        if value is not None and other:
            ratios.append(value / other)
    return Spread.of(ratios)


@dataclass
class DraftCounts:
    """Counts over request-steps: one request in one step of decoding. Steps that compute a prompt
    are not among them.

    Positions count from 0. ``reached[i]`` are the drafts that had a token at position i and all
    before it accepted, so that ``accepted_at[i] / reached[i]`` stays a probability where drafts
    differ in length.
    """

    request_steps: int = 0
    committed: int = 0
    """Tokens that became output: without those past a request's end, which were verified for
    nothing."""
    drafts: int = 0
    """Request-steps with at least one draft token."""
    verified: int = 0
    accepted: int = 0
    reached: Positions = field(default_factory=Positions)
    accepted_at: Positions = field(default_factory=Positions)

    def observe(self, verified: int, accepted: int, committed: int) -> None:
        """Takes in one request-step: draft tokens verified, how many of the first were accepted,
        tokens committed."""
        self.request_steps += 1
        self.committed += committed
        if not verified:
            return
        self.drafts += 1
        self.verified += verified
        self.accepted += accepted
        self.reached.reserve(verified)
        self.accepted_at.reserve(verified)
        self.reached.add(min(accepted + 1, verified))
        self.accepted_at.add(accepted)

    def observe_plain(self, request_steps: int, committed: int) -> None:
        """Takes in so many request-steps without a draft."""
        self.request_steps += request_steps
        self.committed += committed

    @property
    def tau(self) -> float | None:
        """Tokens that a verification of a draft yields; None where nothing was drafted."""
        return tau(self.accepted, self.drafts)

    def as_dict(self) -> dict[str, Any]:
        """The counts, and what follows from them."""
        return {
            "request_steps": self.request_steps,
            "committed": self.committed,
            "drafts": self.drafts,
            "verified": self.verified,
            "accepted": self.accepted,
            "reached": self.reached.counts,
            "accepted_at": self.accepted_at.counts,
            "tau": self.tau,
            "wasted": self.verified - self.accepted,
            "committed_per_request_step": (
                self.committed / self.request_steps if self.request_steps else None
            ),
        }


def pooled_acceptance(runs: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Conditional acceptance by position over all runs: accepted over reached; None where a
    position was never reached."""
    length = max((len(run["reached"]) for run in runs), default=0)
    sums = [
        [sum(run[name][i] for run in runs if i < len(run[name])) for i in range(length)]
        for name in ("accepted_at", "reached")
    ]
    return [
        accepted / reached if reached else None for accepted, reached in zip(*sums, strict=True)
    ]


def pooled_tau(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """tau over all runs: one plus accepted tokens over drafts."""
    drafts = sum(run.get("drafts") or 0 for run in runs)
    return tau(sum(run["accepted"] for run in runs if run.get("drafts")), drafts)

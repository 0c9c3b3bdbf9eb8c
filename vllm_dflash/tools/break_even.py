"""Where a pair pays on this machine: the tau at which whole drafts break even, by requests at a
time and by context, from what an engine measured of its steps at warm-up. Pure.

A step that drafts and verifies commits tau tokens a request, a plain one commits one. So drafting
pays where tau is above the one's time over the other's.

    pytest tests/unit/test_break_even.py
"""

from dataclasses import dataclass

from vllm_dflash.cost_profile import Profile
from vllm_dflash.steps import Work
from vllm_dflash.tools.pair_checks import Check

LOADS = (1, 4, 16, 64, 256)
CONTEXTS = (128, 2048, 8192, 32768, 131072)
NAME = "pays here"


@dataclass(frozen=True)
class BreakEven:
    """The tau that drafting needs."""

    loads: list[int]
    """Requests at a time."""
    contexts: list[int]
    """Positions of each request's context."""
    tau: list[list[float]]
    """By load and context."""


def break_even(
    profile: Profile, k: int, block: int, most_requests: int, most_positions: int
) -> BreakEven:
    """From an engine's ``profile``, for ``k`` draft tokens of a drafter with ``block`` rows a
    request: for loads up to ``most_requests``, and contexts that end before ``most_positions``."""
    loads = [n for n in LOADS if n <= most_requests]
    contexts = [n for n in CONTEXTS if n < most_positions] or [most_positions]

    def tau(n: int, context: int) -> float:
        rows, read = n * (k + 1), n * context
        plain = Work(n, n, 0, read, read)
        drafting = Work(n, rows, n * block, read, rows * context, n * block * context)
        return profile.of(drafting) / profile.of(plain)

    return BreakEven(loads, contexts, [[tau(n, context) for context in contexts] for n in loads])


def pays_check(found: BreakEven | None, tau: float) -> Check:
    """Where drafts with this ``tau`` pay; None for nothing that was measured."""
    if found is None:
        return Check(
            NAME,
            "warning",
            "what a step costs was not measured",
            "`vllm-dflash bench --break-even` measures where drafting pays",
        )
    needed = [each for row in found.tau for each in row]
    said = f"whole drafts break even at tau {min(needed):.2f} to {max(needed):.2f}"
    if tau > max(needed):
        return Check(NAME, "ok", f"at all these loads and contexts: {said}")
    adaptive = "adaptive drafting, unless it is turned off, drafts less there, or nothing"
    if tau <= min(needed):
        return Check(
            NAME,
            "warning",
            f"nowhere: {said}, and tau is {tau:.2f}",
            "serve this text without the drafter, or on a machine on which rows cost less;"
            f" {adaptive}",
        )
    most = [
        max((n for n, row in zip(found.loads, found.tau) if tau > row[i]), default=0)
        for i in range(len(found.contexts))
    ]
    where = ", ".join(
        f"{f'up to {n}' if n else 'none'} at {context:,}"
        for n, context in zip(most, found.contexts, strict=True)
    )
    return Check(NAME, "ok", f"requests by positions of context: {where}; {said}", adaptive)


def table(found: BreakEven, tau: float) -> list[str]:
    """Lines of text; what ``tau`` does not reach is marked."""
    title = "tau at which whole drafts break even here; * is above yours"
    head = f"  {'requests at a time':<20}" + "".join(f"{n:>10,}" for n in found.contexts)
    rows = [
        f"  {n:<20}" + "".join(f"{each:>9.2f}{' ' if tau > each else '*'}" for each in row)
        for n, row in zip(found.loads, found.tau, strict=True)
    ]
    return [title, f"{head}  positions of context", *(row.rstrip() for row in rows)]

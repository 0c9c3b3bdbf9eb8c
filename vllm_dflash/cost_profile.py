"""What a step takes by what it computes, as measured at an engine's warm-up: seconds by the rows of
the target and of the drafter, and by the contexts that they attend to. Pure.

A table, for rows cost as a machine has it: one by one on a CPU, nothing up to a number on a GPU.
Attention is a sum by request: a position of a context is read once for all rows of its request, and
meets each of them.

    pytest tests/unit/test_cost_profile.py
"""

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dflash.steps import Work

_BEYOND = 1 << 20
"""Rows at the end of the line that goes on from the last measured ones."""
_ALIKE = 1.1
"""Times one measurement: another up to it is alike."""


def row_step(count: int) -> int:
    """What numbers of rows about as large as ``count`` are multiples of: there are four in each
    octave."""
    return 1 << max(count.bit_length() - 3, 0)


def round_rows(count: int) -> int:
    """The nearest such number."""
    step = row_step(count)
    return (count + step // 2) // step * step


def power(num_reqs: int) -> int:
    """The nearest power of two, by its logarithm: so many requests are about as many."""
    return (num_reqs * num_reqs).bit_length() // 2


def fill_rows(survivals: Sequence[Sequence[float]], prices: Sequence[float]) -> list[int]:
    """Of each request's draft tokens, how many have a probability above its price: [n], of falling
    probabilities up to the first that has not. The likeliest that were left out are let in, or the
    least likely out, until the target's rows, a row a request besides, are a round number: a CPU's
    kernels are made anew for each number of rows."""
    found = [
        len(survival) - (survival[-1] <= price) if survival else 0
        for survival, price in zip(survivals, prices, strict=True)
    ]
    rows = len(found) + sum(found)
    if missing := round_rows(rows) - rows:
        sign, at = (1, 0) if missing > 0 else (-1, -1)
        can = [
            (sign * (survival[count + at] - price), i)
            for i, (survival, price, count) in enumerate(zip(survivals, prices, found, strict=True))
            if 0 <= count + at < len(survival)
        ]
        for _, i in sorted(can, reverse=True)[: abs(missing)]:
            found[i] += sign
    return found


@dataclass(frozen=True)
class Cell:
    """A measured step, of which ``Work.draft_rows`` are run alone or not at all."""

    work: Work
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Seconds of a step."""

    rows: tuple[float, ...]
    """Numbers of rows, rising; the last two begin a line that goes on."""
    target: tuple[float, ...]
    """Of the target with so many rows, without context."""
    draft: tuple[float, ...]
    """Of the drafter with so many."""
    read: float = 0.0
    """More for each position of a request's context."""
    attend: float = 0.0
    """More for each row of the target's and each position that it attends to."""
    draft_attend: float = 0.0
    """The same of the drafter's rows."""
    is_steady: bool = True
    """False where nothing says that it is the machine's, and not a busy moment's."""

    def target_seconds(
        self, num_tokens: np.ndarray, num_context: float, attended: np.ndarray
    ) -> np.ndarray:
        """The target's part of steps: see ``Work``."""
        found = np.interp(num_tokens, self.rows, self.target)
        found += self.read * num_context + self.attend * attended
        return found

    def draft_seconds(self, rows: float, attended: Any) -> Any:
        """The drafter's part of a step: see ``Work``."""
        return _between(self.rows, self.draft, rows) + self.draft_attend * attended

    def of(self, work: Work) -> float:
        """Seconds of one step."""
        return sum(self.parts(work))

    def parts(self, work: Work) -> tuple[float, float]:
        """The target's and the drafter's of them."""
        target, draft = _between(self.rows, self.target, work.num_tokens), 0.0
        if work.num_context:
            target += self.read * work.num_context + self.attend * work.attended
        if work.draft_rows:
            draft = self.draft_seconds(work.draft_rows, work.draft_attended)
        return target, draft


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """As ``np.interp``, which for one number costs more than the step's other arithmetic."""
    i = min(max(bisect(x, at), 1), len(x) - 1)
    share = (at - x[i - 1]) / (x[i] - x[i - 1])
    return y[i - 1] + min(max(share, 0.0), 1.0) * (y[i] - y[i - 1])


def line(target: tuple[float, float], draft: tuple[float, float], **attention: Any) -> Profile:
    """Of a constant and seconds a row, for the target and for the drafter."""
    ends = (0.0, float(_BEYOND))
    return Profile(
        ends,
        tuple(target[0] + target[1] * n for n in ends),
        tuple(draft[0] + draft[1] * n for n in ends),
        **attention,
    )


GUESS = line((1e-2, 1e-4), (4e-3, 1e-4))
"""Where nothing was measured: what counts is that a step with a block takes some 1.5 plain ones."""


def lowest(works: Sequence[Work], rounds: Sequence[Sequence[float]]) -> tuple[list[Cell], bool]:
    """Of rounds, [R, n], in each of which the same n steps were timed, in the order of their rows:
    the lowest that each step took, for what holds a step up only adds; and whether at least half of
    the steps took as long a second time. They do not where others compute beside: with a thread for
    each core, each kernel may have to wait for one of them. Where a step without context took
    longer than one with more rows, it was held up each time, and takes as long."""
    ordered = np.sort(np.asarray(rounds, dtype=float), axis=0)
    alike, seconds = ordered[1:2] <= _ALIKE * ordered[0], ordered[0].tolist()
    least: dict[bool, float] = {}
    for i in reversed(range(len(seconds))):
        if not works[i].num_context:
            side = works[i].draft_rows > 0
            seconds[i] = least[side] = min(seconds[i], least.get(side, seconds[i]))
    return [Cell(*each) for each in zip(works, seconds)], bool(alike.size and alike.mean() >= 0.5)


def fit(cells: Iterable[Cell], is_steady: bool = True) -> Profile:
    """The profile through measured cells: target steps (no rows of the drafter) and drafts alone
    (none of the target). More rows are taken to cost no less; for each number of rows the lowest of
    its measurements counts, for what held a step up was none of its own.

    Raises:
        ValueError: no target steps, or no drafts, without context.
    """
    kept = list(cells)
    sides = [[c for c in kept if not c.work.draft_rows], [c for c in kept if c.work.draft_rows]]
    tables = []
    for cells_of_one in sides:
        least: dict[int, float] = {}
        for cell in cells_of_one:
            if not cell.work.num_context:
                count = cell.work.draft_rows or cell.work.num_tokens
                least[count] = min(cell.seconds, least.get(count, cell.seconds))
        if not least:
            raise ValueError("the cells have no target steps, or no drafts, without context")
        at = sorted(least)
        tables.append((at, np.maximum.accumulate([least[rows] for rows in at])))
    rows = sorted({0, *tables[0][0], *tables[1][0], _BEYOND})
    target, draft = (_through(rows, *table) for table in tables)
    flat = Profile(tuple(map(float, rows)), target, draft)
    read, attend = _least([(c.work.num_context, c.work.attended) for c in sides[0]], sides[0], flat)
    (drafted,) = _least([(c.work.draft_attended,) for c in sides[1]], sides[1], flat)
    return Profile(flat.rows, target, draft, read, attend, drafted, is_steady)


def _through(rows: Sequence[int], at: Sequence[int], seconds: np.ndarray) -> tuple[float, ...]:
    """Seconds at each of ``rows``: between the measured ones, and on by the line of the last
    two."""
    found = np.interp(rows, at, seconds)
    slope = (
        float(seconds[-1] - seconds[-2]) / (at[-1] - at[-2])
        if len(at) > 1
        else float(seconds[0]) / at[0]
    )
    beyond = np.maximum(np.array(rows) - at[-1], 0)
    return tuple((found + slope * beyond).tolist())


def _least(
    features: Sequence[tuple[int, ...]], cells: Sequence[Cell], flat: Profile
) -> tuple[float, ...]:
    """Seconds for each feature by least squares of what the rows alone do not take; none below
    zero, of those that would be the lowest is left out in turn."""
    over = [
        c.seconds
        - float(
            np.interp(c.work.draft_rows, flat.rows, flat.draft)
            if c.work.draft_rows
            else np.interp(c.work.num_tokens, flat.rows, flat.target)
        )
        for c in cells
    ]
    x, kept = np.array(features, dtype=float), list(range(len(features[0])))
    found = np.zeros(x.shape[1])
    while kept:
        solved = np.linalg.lstsq(x[:, kept], np.array(over), rcond=None)[0]
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return tuple(found.tolist())

"""The tables of the study at one budget (``matched_budget.py``): means with intervals, and
differences seed by seed.

    .venv/bin/python examples/matched_budget.py --part heads --report
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matched_variants import contrasts

_STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}
"""97.5 % quantiles of Student's distribution by degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student); infinite for one value."""
    if len(values) < 2:
        return values[0], float("inf")
    return (
        statistics.mean(values),
        _STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5,
    )


def report(runs: Sequence[Mapping[str, Any]], flops: Mapping[str, float]) -> str:
    """A table of finished runs, best first; ``flops`` of a draft by variant."""
    rows = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        its = [run for run in runs if run["variant"] == name]
        mean, half = interval([run["tau"] for run in its])
        seconds = statistics.median(run["seconds_a_step"] for run in its)
        rows.append((mean, half, len(its), name, its[0]["parameters"], seconds))
    lines = [
        "| drafter | tau | 95 % interval | seeds | parameters | MFLOP a draft | seconds a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for mean, half, count, name, size, seconds in sorted(rows, reverse=True):
        lines.append(
            f"| {name} | {mean:.3f} | ± {half:.3f} | {count} | {size / 1e6:.2f} M"
            f" | {flops[name] / 1e6:.1f} | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def differences(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of the contrasts: tau of one variant less the other's, seed by seed, as both saw the
    same batches; and each question's mean."""
    tau = {(run["variant"], run["seed"]): run["tau"] for run in runs}
    lines = ["| question | | tau | 95 % interval | seeds | |", "|---|---|---|---|---|---|"]

    def row(question: str, what: str, values: Sequence[float]) -> str:
        mean, half = interval(values)
        verdict = "not told apart" if abs(mean) <= half else "higher" if mean > 0 else "lower"
        return f"| {question} | {what} | {mean:+.3f} | ± {half:.3f} | {len(values)} | {verdict} |"

    asked = contrasts({name for name, _ in tau})
    for question in dict.fromkeys(question for question, _, _ in asked):
        found: dict[str, dict[int, float]] = {}
        for _, this, other in (one for one in asked if one[0] == question):
            seeds = sorted(seed for name, seed in tau if name == this and (other, seed) in tau)
            if seeds:
                found[f"{this} less {other}"] = {
                    seed: tau[this, seed] - tau[other, seed] for seed in seeds
                }
        lines += [row(question, what, list(values.values())) for what, values in found.items()]
        most = max((len(values) for values in found.values()), default=0)
        # Those with all seeds, so that a seed is a mean of the same contrasts as another.
        whole = [values for values in found.values() if len(values) == most]
        if len(whole) > 1:
            lines.append(
                row(
                    question,
                    "**mean**",
                    [statistics.mean(values[seed] for values in whole) for seed in whole[0]],
                )
            )
    return "\n".join(lines) + "\n"

"""What each of the controller's constants is worth: the table in docs/adaptive.md. One whose row
says nothing goes.

    pytest -s tests/unit/test_adaptive_ablation.py
"""

import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest

from simulation import BAD, GOOD, Server, large_gpu, long_contexts, profile_of, two_cores
from vllm_dflash.adaptive.tuning import TUNING, Tuning

DOCS = Path(__file__).resolve().parents[2] / "docs" / "adaptive.md"
FAIR = [0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3]
WITHOUT = {
    "every": 256,
    "exploration": 1e-9,
    "margin": 1.0,
    "window": 1,
    "samples": 2,
    "prior": 1e-2,
    "memory": 1e9,
    "recent": 1,
}
"""What stands for a constant's absence."""


@cache
def rates(tuning: Tuning) -> dict[str, float]:
    """Tokens a second of each simulated server."""
    found = {}

    def run(name: str, server: Server, batches: list, **profile: object) -> None:
        controller = server.controller(tuning, **profile)
        found[name] = server.adaptive(batches, controller)

    for num_reqs in (1, 4, 16):
        for label, acceptance in (("good", GOOD), ("fair", FAIR), ("bad", BAD)):
            requests = {f"r{i}": acceptance for i in range(num_reqs)}
            run(
                f"two cores, {num_reqs} {label}",
                Server(two_cores, noise=0.08, held_up=0.01, drift=0.6),
                [requests] * 600,
            )
    turning = [{"r0": BAD}] * 400 + [{"r0": GOOD}] * 800 + [{"r0": BAD}] * 400
    run("text that turns", Server(two_cores, noise=0.05), turning)
    run(
        "text that turns, confident",
        Server(two_cores, noise=0.05, spread=1.0, confident=True),
        turning,
    )
    swinging = [
        {f"{phase}.{i}": FAIR for i in range(num_reqs)}
        for phase, num_reqs in enumerate([1, 32] * 4)
        for _ in range(150)
    ]
    run("a load that swings", Server(two_cores, noise=0.08, drift=0.6), swinging)
    mixed = {f"r{i}": GOOD if i % 2 else BAD for i in range(32)}
    run("good beside bad", Server(large_gpu, noise=0.08), [mixed] * 400)
    confident = {f"r{i}": GOOD for i in range(32)}
    run("confident", Server(large_gpu, spread=2.0, noise=0.05, confident=True), [confident] * 400)
    contexts = {f"r{i}": 128 if i else 1 << 15 for i in range(8)}
    run(
        "a long one among short ones",
        Server(long_contexts, noise=0.05, contexts=contexts, skips=True),
        [dict.fromkeys(contexts, GOOD)] * 400,
    )
    for label, drafts in (("drafts", True), ("plain steps", False)):
        wrong = profile_of(
            two_cores,
            7,
            wrong=lambda work, seconds, drafts=drafts: (
                seconds * (3.0 if bool(work.draft_rows) == drafts else 1.0)
            ),
        )
        for text, acceptance in (("good", GOOD), ("bad", BAD)):
            run(
                f"{label} measured three times as slow, {text}",
                Server(two_cores, noise=0.08),
                [{"r0": acceptance}] * 800,
                profile=wrong,
            )
    return found


def worth(name: str) -> tuple[float, float]:
    """Per cent that the servers are slower without a constant: their mean, and the worst."""
    usual, without = rates(TUNING), rates(replace(TUNING, **{name: WITHOUT[name]}))
    lost = [100 * (1 - without[each] / usual[each]) for each in usual]
    return sum(lost) / len(lost), max(lost)


def table() -> dict[str, tuple[float, float]]:
    """By constant, the two numbers of its row in docs/adaptive.md."""
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (-?[\d.]+) %, (-?[\d.]+) % \|$", DOCS.read_text(), re.MULTILINE
    )
    return {name: (float(mean), float(worst)) for name, mean, worst in rows}


def test_each_constant_has_a_row() -> None:
    assert list(table()) == [field.name for field in fields(Tuning)] == list(WITHOUT)
    assert len(WITHOUT) < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_a_constant_is_worth_what_its_row_says(name: str) -> None:
    mean, worst = worth(name)
    print(f"\n{name}: without it {mean:.1f} % slower in the mean, {worst:.1f} % at worst")
    assert worst > 1.0, "it goes"
    said_mean, said_worst = table()[name]
    assert mean == pytest.approx(said_mean, abs=0.3)
    assert worst == pytest.approx(said_worst, abs=1.0)

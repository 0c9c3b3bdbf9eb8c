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

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "adaptive.md").read_text()
FAIR = [0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3]
OUT: dict[str, float] = {
    "every": 256,
    "exploration": 1e-9,
    "window": 1,
    "trust": 0,
    "usual": 0.05,
    "prior": 0.01,
    "memory": 1e9,
    "recent": 1,
}
"""What stands for a constant's absence."""
HELD = ("every", "memory")
"""Whose rows are measured anew: it takes a server's whole list for each."""


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


def changed(name: str) -> list[Tuning]:
    """A constant doubled, halved, and out."""
    usual = getattr(TUNING, name)
    values = usual * 2, type(usual)(usual / 2), OUT[name]
    return [
        replace(TUNING, **{name: min(value, 1.0) if name == "usual" else value}) for value in values
    ]


def lost(tuning: Tuning) -> tuple[float, float]:
    """Per cent that the servers are slower: their mean, and the worst."""
    usual, found = rates(TUNING), rates(tuning)
    each = [100 * (1 - found[name] / usual[name]) for name in usual]
    return sum(each) / len(each), max(each)


def table() -> dict[str, list[tuple[float, float]]]:
    """By constant, the numbers of its row in docs/adaptive.md."""
    pair = r"(-?[\d.]+), (-?[\d.]+)"
    rows = re.findall(rf"^\| `(\w+)` \|.*\| {pair} \| {pair} \| {pair} \|$", TEXT, re.MULTILINE)
    return {name: [*zip(map(float, n[::2]), map(float, n[1::2]))] for name, *n in rows}


def test_each_constant_has_a_row_with_its_value() -> None:
    assert list(table()) == [field.name for field in fields(Tuning)] == list(OUT)
    for name in OUT:
        assert f"| `{name}` | {getattr(TUNING, name):g} |" in TEXT


def test_each_constant_is_worth_its_place() -> None:
    """Out, it costs some server more than 0.5 % by the table."""
    for name, row in table().items():
        assert row[2][1] > 0.5, f"{name} goes"


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_a_row_says_what_is_measured(name: str) -> None:
    said = table()[name][2]
    found = lost(changed(name)[2])
    print(f"\n{name}: out {found[0]:.1f}, {found[1]:.1f}")
    assert found[0] == pytest.approx(said[0], abs=0.5)
    assert found[1] == pytest.approx(said[1], abs=2.0)

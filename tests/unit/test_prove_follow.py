"""What the long proofs of docs/follow.md say of what they have measured, by numbers made up.

pytest tests/unit/test_prove_follow.py
"""

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from following import curve, kill, rolling, soak
from following.record import Lines


def test_lines_go_on_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "soak.jsonl"
    Lines(path).add(turn=1)
    with path.open("a") as file:
        file.write('{"tur')
    lines = Lines(path)
    lines.add(turn=2)
    assert [row["turn"] for row in Lines(path).rows] == [1, 2]
    assert lines.of(turn=2) == [{"turn": 2}]


def test_tau_between_two_histograms() -> None:
    before = {1.0: 5.0, 2.0: 5.0, 3.0: 6.0, float("inf"): 6.0}
    now = {1.0: 15.0, 2.0: 25.0, 3.0: 46.0, float("inf"): 46.0}
    found = soak.tau_of(before, now)
    assert found["verifications"] == 40
    assert found["tau"] == pytest.approx((10 * 1 + 10 * 2 + 20 * 3) / 40)
    assert found["half"] == pytest.approx(1.96 * (0.6875 * 40 / 39 / 40) ** 0.5)
    assert soak.tau_of(now, now) == {"tau": None, "half": None, "verifications": 0}


def swap(turn: int, tau: float | None, mb: float = 500.0, half: float = 0.02) -> dict[str, Any]:
    name = soak.NAMES[(turn + 1) % 2]
    return {
        "adaptive": False,
        "turn": turn,
        "session": 1,
        "drafter": name,
        "seconds": 0.5,
        "status": 0,
        "in_force": True,
        "minutes": float(turn),
        "memory_mb": {"server": 100.0, "worker": mb - 100},
        "tau": tau,
        "half": half,
        "verifications": 5000,
        "counts": {"chat": 50, "compared": 30},
        "failed": [],
        "differing": [],
    }


def reference(name: str, tau: float) -> dict[str, Any]:
    row = swap(0, tau)
    return {n: row[n] for n in row if n not in ("turn", "drafter")} | {"reference": name}


def soaked(**changes: Any) -> list[str]:
    dice, grow = random.Random(0), changes.pop("grow", 0.0)
    rows = [reference("good", 4.0), reference("noisy", 3.0)]
    for turn in range(30):
        mb = 500 + grow * turn + dice.random()
        rows.append(swap(turn, (3.0, 4.0)[turn % 2] + dice.uniform(-0.02, 0.02), mb))
    rows[8] |= changes
    return soak.verdicts(rows, (False, True))


def test_a_soak_that_holds() -> None:
    found = soaked()
    assert not [line for line in found if line.startswith(("FAILS", "open"))]
    assert "holds 0 of 1,600 requests failed" in found
    assert "holds 0 of 960 greedy answers differ from the twin's" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failed": [{"error": "TimeoutError"}]}, "FAILS 1 of 1,600 requests failed: "),
        ({"differing": [{"request": 3}]}, "FAILS 1 of 960 greedy answers differ"),
        ({"in_force": False}, "FAILS 1 of 30 swaps without the new drafter's id: [6]"),
        ({"tau": 3.3, "half": 0.05}, "FAILS noisy: tau 3.000"),
        ({"tau": 3.1, "half": 0.05}, "open  noisy: tau 3.000"),
        ({"grow": 2.0}, "FAILS memory: +"),
    ],
)
def test_what_is_wrong_in_a_soak(changes: dict[str, Any], said: str) -> None:
    assert [line for line in soaked(**changes) if line.startswith(said)], soaked(**changes)


def test_with_the_controller_the_first_position_counts() -> None:
    """It verifies as much as pays, so tau is not the drafter's alone."""
    rows: list[dict[str, Any]] = [reference("good", 4.0) | {"first_position": [5000, 3000]}]
    rows += [swap(1, 2.0) | {"first_position": [5000, 3010]}]
    rows = [row | {"adaptive": True} for row in rows]
    (said,) = soak._taus(rows, "good", True)
    assert said.startswith("holds good: accepted first 0.600")
    assert said.endswith("; tau 4.000 and 2.000")
    rows[1]["first_position"] = [5000, 2500]
    assert soak._taus(rows, "good", True)[0].startswith("FAILS")


def test_memory_is_judged_within_a_session() -> None:
    """A server that was started anew has another amount; that is no growth."""
    dice = random.Random(0)
    rows = [swap(turn, 3.0, 500 + dice.random()) for turn in range(12)]
    rows += [swap(turn, 3.0, 900 + dice.random()) | {"session": 2} for turn in range(12, 24)]
    assert soak._memory(rows)[0].startswith("holds memory")
    assert soak._memory(rows[:2])[0].startswith("open ")


def test_a_curve() -> None:
    dice = random.Random(0)

    def counts(accepted: int) -> list[list[int]]:
        return [[20, accepted + dice.randint(-2, 2)] for _ in range(48)]

    rows = [
        {"state": "before", "counts": counts(60)},
        {"state": "after", "counts": counts(30)},
        {"state": "decision", "decision": "kept", "line": "tau 2.50 -> 3.50"},
        {"state": "refresh", "minutes": 5.0, "steps": 9, "counts": counts(50)},
        {"state": "refresh", "minutes": 1.0, "steps": 2, "counts": counts(40)},
    ]
    found = curve.verdicts(rows)
    assert found[-1].startswith("holds 6") or found[-1].startswith("holds 7")
    assert [line.split(":")[0].strip() for line in found[:4]] == [
        "before",
        "after",
        "refresh of 1 minutes",
        "refresh of 5 minutes",
    ]
    rows[3]["counts"] = counts(40)
    assert curve.verdicts(rows)[-1].startswith("FAILS")


def test_a_curve_as_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"state": "before", "counts": [[10, 30], [10, 31]]},
        {"state": "after", "counts": [[10, 10], [10, 11]]},
        {"state": "refresh", "minutes": 1.0, "steps": 2, "counts": [[10, 20], [10, 22]]},
    ]
    curve.write(rows, tmp_path / "curve-1.jsonl")
    lines = (tmp_path / "curve-1.csv").read_text().splitlines()
    assert lines[0] == "state,minutes,steps,tau,gain,half,back,back_half"
    assert lines[3].startswith("refresh,1.0,2,3.1")
    assert (tmp_path / "curve-1.png").read_bytes()[1:4] == b"PNG"


def killed(**changes: Any) -> list[str]:
    one = {"case": "stage", "serves": "old", "status": -signal.SIGKILL, "left": None}
    rows: list[dict[str, Any]] = [one | {"stage": stage} for stage in kill.STAGES]
    last = one | {"stage": "the next command", "serves": "new"}
    rows += [last, {"case": "swap", "turn": 0, "serves": "good"}]
    full = {"case": "disk", "free_mb": 1.0, "status": 1, "remedy": True, "traceback": False}
    rows += [full | {"serves": "old"}, full | {"free_mb": None, "status": 0, "serves": "new"}]
    rows += [{"case": "mixture", "serves": "neither", "id": "0" * 12}]
    rows[3] |= changes
    return kill.verdicts(rows, 1)


def test_kills() -> None:
    assert not [line for line in killed() if line.startswith(("FAILS", "open"))]
    assert [line for line in killed(serves="neither") if line.startswith("FAILS 1 of 15 kills")]
    assert [line for line in killed(left="VLLM") if line.startswith("FAILS 1 of 15 kills leave")]
    assert [line for line in killed(status=0) if line.startswith("FAILS 1 of 15 stages were not")]


def test_a_rolling_swap() -> None:
    row = {"drafter": "good", "in_force": True, "replicas": 3, "refused": None, "seconds": 9.0}
    row |= {
        "turn": 0,
        "counts": {"completion": 40},
        "longest_s": 2.0,
        "left": 0,
        "failed": [],
        "differing": [],
    }
    bad = row | {"drafter": "nan", "refused": "NaN", "turn": 1}
    assert not [v for v in rolling.verdicts([row, bad]) if v.startswith(("FAILS", "open"))]
    found = rolling.verdicts(
        [row | {"failed": ["HTTP 500"], "replicas": 2}, bad | {"refused": None}]
    )
    assert [v.partition(" of ")[0] for v in found if v.startswith("FAILS")] == [
        "FAILS 1",
        "FAILS 1",
        "FAILS 1",
    ]

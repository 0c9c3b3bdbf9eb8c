"""What the long proofs of docs/follow.md say of what they have measured, by numbers made up.

pytest tests/unit/test_prove_follow.py
"""

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import follow_plot
from following import curve, kill, rolling, share, soak
from following.plot import BEGIN, END, fill
from following.record import Lines
from following.traffic import Traffic


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
        "probes": {"tau": tau, "half": half, "verifications": 500},
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
    if probed := changes.pop("probed", None):
        rows[8]["probes"] = {"tau": probed, "half": 0.1, "verifications": 500}
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
        ({"probed": 3.1}, "FAILS noisy: tau on the probes 3.0000"),
        ({"probed": 2.9}, "FAILS noisy: tau on the probes 3.0000"),
        ({"grow": 2.0}, "FAILS memory: +"),
    ],
)
def test_what_is_wrong_in_a_soak(changes: dict[str, Any], said: str) -> None:
    assert [line for line in soaked(**changes) if line.startswith(said)], soaked(**changes)


def test_tau_of_the_traffic_is_said_and_not_judged() -> None:
    """Of a minute of it chance alone makes a few per cent; with the controller, what it drafts
    for."""
    said = [line for line in soaked(tau=3.3) if "noisy: tau" in line]
    assert [line[:5] for line in said] == ["holds", "     "]
    assert "tau of the traffic 3.0" in said[1]


@pytest.mark.parametrize("adaptive", [False, True])
def test_tau_after_a_swap_is_judged_with_the_controller_too(adaptive: bool) -> None:
    rows = [row | {"adaptive": adaptive} for row in (reference("good", 4.0), swap(1, 4.1))]
    assert any(line.startswith("holds good") for line in soak.verdicts(rows, (adaptive,)))
    rows[1]["probes"]["tau"] = 3.8
    assert any(line.startswith("FAILS good") for line in soak.verdicts(rows, (adaptive,)))
    rows[1]["probes"]["tau"] = None
    assert any(line.startswith("open  good") for line in soak.verdicts(rows, (adaptive,)))


def test_a_server_that_is_not_the_same_twice_is_no_reference() -> None:
    rows = [reference("good", 4.0), reference("good", 4.2), swap(1, 4.1)]
    assert soak._taus(rows, "good")[0].startswith("FAILS good: tau on the probes 4.1000")
    assert soak._taus(rows[:2], "good")[0].startswith("open  good")


def test_probes_are_asked_while_the_traffic_waits() -> None:
    running, together = [0, 0], []
    lock, kinds = threading.Lock(), ["chat", "chat", "probe", "probe"]

    def ask(at: int) -> int:
        is_probe = kinds[at] == "probe"
        with lock:
            running[is_probe] += 1
            together.append((at, *running))
        time.sleep(0.002)
        with lock:
            running[is_probe] -= 1
        return at

    with Traffic(3, ask, [None, None, 2, 9], kinds) as traffic:
        time.sleep(0.05)
        with traffic.paused():
            traffic.probe()
        time.sleep(0.05)
    asked = [row for row in together if row[0] >= 2]
    assert asked == [(2, 0, 1), (3, 0, 1)]
    assert together[-1][0] < 2, "the traffic goes on"
    found = traffic.take()
    assert (found["counts"]["probe"], found["counts"]["compared"]) == (2, 2)
    assert found["differing"] == [{"request": 3, "got": 3}]


def test_memory_is_judged_within_a_session() -> None:
    """A server that was started anew has another amount; that is no growth."""
    dice = random.Random(0)
    rows = [swap(turn, 3.0, 500 + dice.random()) for turn in range(12)]
    rows += [swap(turn, 3.0, 900 + dice.random()) | {"session": 2} for turn in range(12, 24)]
    assert soak._memory(rows)[0].startswith("holds memory")
    assert soak._memory(rows[:2])[0].startswith("open ")


def drafted(accepted: int, seed: int, count: int = 48) -> list[list[int]]:
    """Of each prompt 20 drafts, and about so many accepted tokens."""
    dice = random.Random(seed)
    return [[20, accepted + dice.randint(-2, 2)] for _ in range(count)]


def curved(after: int, new: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a curve; before it was 60."""
    decision = {"state": "decision", "decision": "kept", "line": "tau 2.50 -> 3.50"} | changes
    return [
        {"state": "before", "counts": drafted(60, 0)},
        {"state": "own text", "counts": drafted(70, 1)},
        {"state": "after", "counts": drafted(after, 2)},
        decision,
        {"state": "refresh", "minutes": 5.0, "steps": 9, "counts": drafted(new, 3)},
        {"state": "refresh", "minutes": 1.0, "steps": 2, "counts": drafted(40, 4)},
    ]


def test_a_curve() -> None:
    found = curve.verdicts(curved(30, 54))
    assert [line.split(":")[0].strip() for line in found[:5]] == [
        "own text",
        "before",
        "after",
        "refresh of 1 minutes",
        "refresh of 5 minutes",
    ]
    assert found[-2].startswith(("holds 7", "holds 8")), found[-2]
    assert "of what was lost on the same prompts (1.5" in found[-2]
    assert found[-1].startswith(("holds 5", "holds 6")), found[-1]
    assert "of what was lost against its own text (1.98" in found[-1]


@pytest.mark.parametrize(
    ("rows", "same_prompts", "own_text"),
    [
        (curved(30, 40), "FAILS 3", "FAILS 2"),
        (curved(30, 45), "open  ", "FAILS 3"),
        (curved(60, 66), "open  nothing that is told from 0 was ", "holds 6"),
        (
            curved(62, 66),
            "open  nothing that is told from 0 was lost on the same prompts: -0.0",
            "open  ",
        ),
        (curved(30, 54, decision="refused"), "FAILS 8", "FAILS 6"),
    ],
)
def test_what_is_said_of_a_curve(
    rows: list[dict[str, Any]], same_prompts: str, own_text: str
) -> None:
    """What was lost, or the share of it, may not be told apart: that is open, not a verdict."""
    first, second = curve.verdicts(rows)[-2:]
    assert first.startswith(same_prompts), first
    assert second.startswith(own_text), second


@pytest.mark.parametrize("paired", [True, False])
def test_a_shares_interval_holds_the_truth(paired: bool) -> None:
    """In 93 to 97 % of 2000 draws, with prompts that are hard or easy for all drafters."""
    dice, inside, truth = random.Random(0), 0, 0.5
    for _ in range(2000):
        rows: list[list[list[int]]] = [[], [], []]
        for _ in range(48):
            hard, drafts = dice.gauss(0, 6), dice.randint(15, 25)
            other = hard if paired else dice.gauss(0, 6)
            for row, rate, its in zip(rows, (3.0, 1.0, 2.0), (other, hard, hard), strict=True):
                row.append([drafts, round(drafts * rate + its + dice.gauss(0, 4))])
        found = share.share(*rows, paired=paired)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_a_curve_as_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = curved(30, 54)
    curve.write(rows, tmp_path / "curve-5.jsonl")
    lines = (tmp_path / "curve-5.csv").read_text().splitlines()
    assert lines[0] == ",".join(curve.NAMES)
    assert lines[-1].startswith("refresh,5.0,9,3.7")
    assert (tmp_path / "curve-5.png").read_bytes()[1:4] == b"PNG"


def test_a_curve_in_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same: what stood between the marks is replaced."""
    pytest.importorskip("matplotlib")
    curve.write(curved(30, 54), tmp_path / "curve-5.jsonl")
    page, figures = tmp_path / "follow.md", str(tmp_path / "curve-5.json")
    page.write_text(f"Before.\n\n{BEGIN}\n{END}\n\nAfter.\n")
    command = ["follow_plot.py", "--curve", figures, "--quantized", figures]
    monkeypatch.setattr("sys.argv", [*command, "--document", str(page)])
    texts = []
    for _ in range(2):
        assert follow_plot.main() == 0
        texts.append(page.read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"Before.\n\n{BEGIN}\n![")
    assert texts[0].endswith("\n\nAfter.\n")
    (last,) = [line for line in texts[0].splitlines() if line.startswith("| after 5 minutes")]
    assert last.split("|")[2] == last.split("|")[3]
    assert last.split("|")[2].strip().startswith("3.7")
    assert (tmp_path / "follow-tau.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="has not the lines"):
        fill("nothing", "content")


def killed(**changes: Any) -> list[str]:
    one = {"case": "stage", "serves": "old", "status": -signal.SIGKILL, "left": None}
    rows: list[dict[str, Any]] = [one | {"stage": stage} for stage in kill.STAGES]
    last = one | {"stage": "the next command", "serves": "new"}
    rows += [last, {"case": "swap", "turn": 0, "serves": "good"}]
    full = {"case": "disk", "free_mb": 1.0, "status": 1, "remedy": True, "traceback": False}
    rows += [full | {"serves": "old"}, full | {"free_mb": None, "status": 0, "serves": "new"}]
    rows += [{"case": "mixture", "serves": "neither", "id": "0" * 12}]
    rows[3] |= changes
    return kill.verdicts(rows)


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

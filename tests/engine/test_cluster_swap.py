"""A rolling swap of three replicas on Ray under load: none fails, all have the new drafter
afterwards, and a bad one leaves all with the old. A short ``prove_follow.py --part ray``.

Needs ``pip install 'vllm-dflash[ray]'``.

    pytest -s tests/engine/test_cluster_swap.py
"""

from pathlib import Path

import pytest

from following import rolling
from following.record import FAILS, OPEN, Lines

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_three_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "SETTLE_S", 3.0)
    lines = Lines(tmp_path / "ray.jsonl")
    rolling.run(tmp_path, lines, 3)
    found = rolling.verdicts(lines.rows)
    print("", *found, sep="\n")
    assert [line for line in found if line.startswith((FAILS, OPEN))] == []
    assert [row["drafter"] for row in lines.rows] == ["noisy", "good", "nan"]
    assert "NaN" in lines.rows[2]["refused"]

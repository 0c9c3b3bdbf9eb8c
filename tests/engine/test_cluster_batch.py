"""A data set over Ray Data: every row once, answered as by one process, figures that add up;
poisoned rows, lost actors and resuming.

Needs ``pip install 'vllm-dflash[ray]'``. 512 rows, a killed driver and 200,000 rows are in
``tests/prove_batch.py``, to be run by hand.

    pytest -s tests/engine/test_cluster_batch.py
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster_workers import POISON, POISONED, Counting, StandIn
from engine.cluster_harness import ray_cluster, room_taken, wait_until_free
from engine.harness import DRAFTER, PROMPTS, TARGET, Batch
from vllm_dflash.cluster import connection
from vllm_dflash.cluster.batch import Job, complete
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.files import RunError

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ENGINE = EngineSettings(
    str(TARGET),
    str(DRAFTER),
    "cpu",
    7,
    dtype="float32",
    max_model_len=512,
    engine_args={"kv_cache_memory_bytes": 1 << 28, **POISONED},
)
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        yield


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(out.glob("part-*.jsonl"))
        for line in path.read_text().split("\n")
        if line
    ]


def test_rows_are_those_of_one_process_and_bad_ones_cost_themselves_alone(
    tmp_path: Path, plain_float32: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 24 good rows: one that ends its engine, a broken line, one that is too long, one with a
    parameter that does not exist, and one with a parameter of another type, after which every row
    was waited for for ever.

    And the plug-in is loaded in every process of it, the first engine's and the later ones'.
    """
    monkeypatch.setenv("VLLM_DFLASH_REPORT", str(tmp_path))
    from transformers import AutoTokenizer

    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:24]]
    lines = [
        json.dumps({"id": i, "prompt": prompt, "tags": [i, "mixed"]})
        for i, prompt in enumerate(prompts)
    ]
    lines.insert(20, json.dumps({"id": "parameter", "prompt": "x", "sampling_params": {"heat": 1}}))
    typed = {"id": "type", "prompt": "x", "sampling_params": {"max_tokens": 3.0}}
    lines.insert(17, json.dumps(typed))
    lines.insert(15, json.dumps({"id": "long", "prompt_token_ids": [5] * 600}))
    lines.insert(9, json.dumps({"id": "deadly", "prompt_token_ids": POISON}))
    lines.insert(4, '{"id": "broken", ')
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    job = Job(
        [str(tmp_path / "in.jsonl")],
        out,
        ENGINE,
        {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True},
        1,
        rows_per_part=7,
    )
    sums = complete(job, Counting)

    processes = json.loads((out / "_batch" / "processes.json").read_text())
    print("", *processes, sep="\n  ")
    assert all(processes.values())
    assert {
        kind
        for kind in ("ray::", "VLLM::EngineCore", "VLLM::Worker")
        for name in processes
        if name.startswith(kind)
    } == {"ray::", "VLLM::EngineCore", "VLLM::Worker"}

    rows = rows_of(out)
    assert [row.get("id") for row in rows] == [
        json.loads(line)["id"] if line.endswith("}") else None for line in lines
    ]
    bad = {row.get("id", row.get("line")): row["error"] for row in rows if row["error"] is not None}
    assert bad.keys() == {"parameter", "type", "long", "deadly", '{"id": "broken", '}
    assert "ended while it answered this row alone" in bad["deadly"]
    assert "line 5 is no JSON" in bad['{"id": "broken", ']
    assert "heat" in bad["parameter"]
    assert "`$.max_tokens`" in bad["type"]
    assert "512" in bad["long"]

    good = [row for row in rows if row["error"] is None]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    assert [row["completion"] for row in good] == [
        tokenizer.decode(tokens[:TOKENS]) for tokens in plain_float32[0].tokens[:24]
    ]
    assert all(
        row["finish_reason"] == "length"
        and row["completion_tokens"] == TOKENS
        and row["tags"][1] == "mixed"
        for row in good
    )
    assert (sums["rows"], sums["failed"], sums["completion_tokens"]) == (29, 5, 24 * TOKENS)
    print(f"\n{sums['drafts']} drafts, tau {1 + sums['accepted_tokens'] / sums['drafts']:.2f}")
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert sums[name] == sum(row[name] for row in good)
        # At least: the engines that one row ended had drafted for others, which were then answered
        # anew.
        assert (
            sum(json.loads(path.read_text())[name] for path in (out / "_batch").glob("counters-*"))
            >= sums[name]
            > 0
        )


def test_a_lost_actor_and_a_second_run_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Resuming is by files: what is there is counted, not done again; another input or setting is
    refused."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": f"p{i}"}) + "\n" for i in range(500))
    )
    out = tmp_path / "out"
    job = Job([str(tmp_path / "in.jsonl")], out, ENGINE, {"max_tokens": 1}, 2, rows_per_part=16)
    (out / "_batch").mkdir(parents=True)
    for number in (3, 17):
        (out / "_batch" / f"die-on-{number}").touch()
    assert complete(job, StandIn)["rows"] == 500
    assert [row["id"] for row in rows_of(out)] == list(range(500))
    assert not list((out / "_batch").glob("die-on-*"))

    for number in (0, 20, 31):
        (out / f"part-{number:06d}.jsonl").unlink()
    kept = (out / "part-000001.jsonl").stat().st_mtime_ns
    assert complete(job, StandIn)["completion_tokens"] == 500
    assert [row["id"] for row in rows_of(out)] == list(range(500))
    assert (out / "part-000001.jsonl").stat().st_mtime_ns == kept
    with pytest.raises(RunError, match=r"max_tokens.*choose another --out"):
        complete(Job(job.inputs, out, ENGINE, {"max_tokens": 2}, 2, rows_per_part=16), StandIn)


def test_a_bad_row_costs_itself_alone_and_errors_are_counted(tmp_path: Path) -> None:
    """Half of a surrogate pair in a field beside the prompt, and deep nesting, once ended the job,
    and the next run again."""
    bad = [
        '{"prompt": "x", "note": "\\ud83d"}',
        '{"prompt": "y", "note": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "wrong"}',
    ]
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:20], *bad, *lines[20:]]))
    job = Job([str(tmp_path / "in.jsonl")], tmp_path / "out", ENGINE, {}, 1, rows_per_part=4)
    sums = complete(job, StandIn)
    assert (sums["rows"], sums["failed"]) == (43, 2)
    assert json.loads((tmp_path / "out" / "_batch" / "summary.json").read_text())["failed"] == 2
    rows = rows_of(tmp_path / "out")
    assert rows[20]["note"] == "\ud83d"
    assert [row["error"] is None for row in rows[19:24]] == [True, True, False, False, True]
    assert complete(replace(job, max_errors=2), StandIn) == sums
    for out in ("out", "new"):
        with pytest.raises(
            ClusterError,
            match=(
                r"rows failed, and --max-errors is 1: their field error in .* Raise --max-errors to"
                r" go on"
            ),
        ):
            complete(replace(job, out=tmp_path / out, max_errors=1), StandIn)


def test_room_that_is_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the check another job takes it: Ray waits for ever. It is said within a minute, and
    what was waited for does not take the room later."""
    monkeypatch.setattr(connection, "check_room", lambda *args: None)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    began = time.monotonic()
    with (
        room_taken(2),
        pytest.raises(
            ClusterError, match="the cluster had room, but 1 replicas did not start within 45 s"
        ),
    ):
        complete(Job([str(tmp_path / "in.jsonl")], tmp_path / "out", ENGINE, {}, 1), StandIn)
    assert time.monotonic() - began < 60
    wait_until_free(2, 30)


def test_parquet_in_and_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(
        pa.table({"prompt": [f"p{i}" for i in range(50)], "weight": [0.5] * 50}),
        tmp_path / "in.parquet",
        row_group_size=20,
    )
    complete(
        Job([str(tmp_path / "in.parquet")], tmp_path / "out", ENGINE, {}, 2, rows_per_part=8),
        StandIn,
    )
    table = parquet.read_table(tmp_path / "out")
    assert table.column("completion").to_pylist() == [f"p{i}" for i in range(50)]
    assert table.column("weight").to_pylist() == [0.5] * 50

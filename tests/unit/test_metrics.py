"""Metrics without an engine: the catalog, what recorders count in, snapshots, the text.
``test_metrics_top.py`` has the figures that are read from it."""

import errno
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from prometheus_client.parser import text_string_to_metric_families

from damage import DAMAGES, DENIALS, as_a_user
from vllm_dflash import files
from vllm_dflash.acceptance import Positions
from vllm_dflash.metrics import catalog, recorder, snapshots
from vllm_dflash.metrics.counts import Histogram, Speedup, by_position
from vllm_dflash.metrics.read import read
from vllm_dflash.metrics.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]


def histogram(name: str, *values: float) -> list[object]:
    counts = Histogram(catalog.BY_NAME[name].buckets)
    for value in values:
        counts.observe(value)
    return counts.sample()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(snapshots.USERS, str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def leave(folder: Path, engine: str = "0", **samples: object) -> None:
    snapshots.write(
        folder / snapshots.file_name("engine", engine),
        {"labels": ["m", engine], "samples": samples},
    )


def test_names_follow_prometheus_rules():
    assert len(catalog.BY_NAME) == len(catalog.ALL)
    for metric in catalog.ALL:
        assert metric.name.startswith("vllm_dflash_")
        assert ":" not in metric.name
        assert metric.name.endswith("_total") == (metric.kind == catalog.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind == catalog.HISTOGRAM), metric.name
        assert metric.help.endswith("."), metric.name


def test_the_guide_has_the_table_of_the_code():
    assert catalog.table() in (ROOT / "docs" / "monitoring.md").read_text(), (
        "python -m vllm_dflash.metrics.catalog prints the table"
    )


def test_buckets_of_labels():
    assert [catalog.context_bucket(n) for n in (0, 255, 256, 4095, 4096, 10**6)] == [
        "0-255",
        "0-255",
        "256-1023",
        "1024-4095",
        "4096-16383",
        "65536+",
    ]
    assert [catalog.confidence_bucket(i) for i in (0, 9)] == ["0.0-0.1", "0.9-1.0"]


def test_positions_are_counted_from_the_ends_of_drafts():
    counts = Positions()
    for length in (0, 2, 3, 3, 1):
        counts.add(length)
    assert by_position(counts) == [(["1"], 4), (["2"], 3), (["3"], 2)]


def test_a_histogram_counts_a_bound_in_its_own_bucket():
    counts = Histogram((1.0, 2.0))
    for value in (1, 2, 2, 3):
        counts.observe(value)
    assert counts.sample() == [[1, 2, 1], 8.0]


def test_speedup_against_plain_steps():
    speedup = Speedup()
    assert speedup.recent is None
    for _ in range(10):
        speedup.observe(num_reqs=2, committed=6, seconds=0.02, plain_seconds=0.01)
    assert speedup.baseline / speedup.measured == pytest.approx(1.5)
    assert speedup.recent == pytest.approx(1.5)


def test_text_of_snapshots(folder: Path):
    leave(
        folder,
        accepted_length=[([], histogram("accepted_length", 1, 4, 4))],
        reached_tokens=[(["1"], 3)],
    )
    leave(folder, "1", reached_tokens=[(["1"], 5)])
    found = {f.name: f for f in text_string_to_metric_families(read(wait=False))}
    assert set(found) == {"vllm_dflash_accepted_length", "vllm_dflash_reached_tokens"}
    assert {s.labels["engine"]: s.value for s in found["vllm_dflash_reached_tokens"].samples} == {
        "0": 3,
        "1": 5,
    }
    lengths = {
        s.labels.get("le", s.name): s.value for s in found["vllm_dflash_accepted_length"].samples
    }
    assert (lengths["1.0"], lengths["3.0"], lengths["4.0"], lengths["+Inf"]) == (1, 1, 3, 3)
    assert lengths["vllm_dflash_accepted_length_sum"] == 9


def test_two_servers_in_one_folder(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Of one model name: a series was there twice, which Prometheus does not take."""
    monkeypatch.setattr("vllm_dflash.metrics.read._told", [])
    for role, count in (("engine", 3), ("other", 5)):
        samples = {
            "reached_tokens": [(["1"], count)],
            "accepted_length": [([], histogram("accepted_length", 1, count))],
            "next_trial_seconds": [([], count)],
        }
        snapshots.write(
            folder / snapshots.file_name(role, "0"), {"labels": ["m", "0"], "samples": samples}
        )
    read(wait=False)
    found = {f.name: f for f in text_string_to_metric_families(read(wait=False))}
    assert [s.value for s in found["vllm_dflash_reached_tokens"].samples] == [8]
    assert [s.value for s in found["vllm_dflash_next_trial_seconds"].samples] == [5]
    lengths = {
        s.labels.get("le", s.name): s.value for s in found["vllm_dflash_accepted_length"].samples
    }
    assert (lengths["1.0"], lengths["3.0"], lengths["+Inf"]) == (2, 3, 4)
    assert lengths["vllm_dflash_accepted_length_sum"] == 10
    assert sum("two servers leave their metrics" in r.message for r in caplog.records) == 1


def test_a_process_that_is_gone_leaves_no_series(folder: Path):
    """Prometheus would show its last values for ever, beside those of the process in its place."""
    code = (
        "from pathlib import Path; from vllm_dflash.metrics import snapshots as s;"
        " s.write(s.folder() / s.file_name('engine', '0'), {'labels': ['m', '0'], 'samples':"
        " {'reached_tokens': [[['1'], 9]]}})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert len(list(folder.glob("*.json"))) == 1
    leave(folder, reached_tokens=[(["1"], 2)])
    assert next(
        line for line in read(wait=False).splitlines() if line.startswith("vllm_dflash_reached")
    ).endswith(" 2.0")
    assert len(list(folder.glob("*.json"))) == 1
    # The same number, another process.
    (folder / f"engine-0-{os.getpid()}-1.json").write_text("{}")
    assert read(wait=False).count("vllm_dflash_reached_tokens_total{") == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_costs_its_own_series_alone(folder: Path, damage: str):
    """One that was not as it should be once made all of /metrics answer 400."""
    leave(
        folder,
        "0",
        reached_tokens=[(["1"], 2)],
        accepted_length=[([], histogram("accepted_length", 1, 3))],
    )
    leave(folder, "1", reached_tokens=[(["1"], 3)])
    DAMAGES[damage](folder / snapshots.file_name("engine", "0"))
    with as_a_user():
        text = read(wait=False)
    found = [
        line for line in text.splitlines() if line.startswith("vllm_dflash_reached_tokens_total")
    ]
    assert (
        found[-1] == 'vllm_dflash_reached_tokens_total{engine="1",model_name="m",position="1"} 3.0'
    )


@pytest.mark.parametrize(
    "sample",
    [
        None,
        [],
        3,
        [["1"]],
        [["1", "2"], 3],
        [["1"], "3"],
        [["1"], [1, 2]],
        [[["1"]], 3],
        [["1"], 3, 4],
        [["1"], float("nan")],
        [["\ud83d"], 3],
    ],
)
def test_a_sample_of_another_shape_is_left_out(folder: Path, sample: object):
    leave(folder, "0", reached_tokens=[sample], accepted_length=[sample], drafter_info=[sample])
    leave(folder, "1", reached_tokens=[(["1"], 3)])
    assert 'vllm_dflash_reached_tokens_total{engine="1",model_name="m",position="1"} 3.0' in read(
        wait=False
    )


@pytest.mark.parametrize("label", ["m\ud83d", None, [], {}])
def test_a_snapshot_with_a_label_that_cannot_be_written_is_left_out(folder: Path, label: object):
    """Half of a surrogate pair once made all of /metrics fail with a UnicodeEncodeError."""
    target = folder / snapshots.file_name("engine", "0")
    snapshots.write(target, {"labels": [label, "0"], "samples": {"reached_tokens": [[["1"], 2]]}})
    leave(folder, "1", reached_tokens=[(["1"], 3)])
    assert read(wait=False).count("vllm_dflash_reached_tokens_total{") == 1


def test_files_of_others_in_the_folder(folder: Path):
    """A stray ``.json`` once made all of /metrics answer 400. It is left alone; so are pipes and
    folders."""
    leave(folder, reached_tokens=[(["1"], 2)])
    for name in ("notes.json", "a-b.json", "engine-0-x-y.json", "-1-2.json"):
        (folder / name).write_text("{}")
    os.mkfifo(folder / f"engine-1-{os.getpid()}-{snapshots._started(os.getpid())}.json")
    (folder / "engine-0-1-1.json").mkdir()
    assert "vllm_dflash_reached_tokens_total{" in read(wait=False)
    assert (folder / "notes.json").exists()


class Source:
    """What is counted."""

    def samples(self) -> dict[str, list[object]]:
        return {"reached_tokens": [(["1"], 2)]}


def recorder_of(source: Source) -> Recorder:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    return Recorder("engine", config, source.samples)


@pytest.mark.parametrize("denial", DENIALS)
def test_a_folder_without_permission(folder: Path, denial: str, caplog: pytest.LogCaptureFixture):
    """What cannot be read is left out of /metrics, which answers; a writer says so once and goes
    on."""
    leave(folder, reached_tokens=[(["1"], 2)])
    source = Source()
    recording = recorder_of(source)
    recording._stop.set()  # its own thread is not this one, for which alone the modes hold
    folder.chmod(DENIALS[denial])
    try:
        with as_a_user():
            text = read(wait=False)
            recording.flush()
            recording.flush()
    finally:
        folder.chmod(0o755)
        recording.close()
    assert ("reached_tokens_total{" in text) == (denial == "no writing")
    assert caplog.text.count("are not up to date until it can be written") == (
        denial != "no listing"
    )


def test_a_disk_that_is_full_for_a_while(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It once ended the writing thread for good; now the next second writes what was counted
    meanwhile. No part of a file is left."""
    full, create = [True], files.create

    def create_there(path: Path) -> IO[bytes]:
        file = create(path)
        if full[0]:
            file.write(b"{..")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(files, "create", create_there)
    monkeypatch.setattr(recorder, "PERIOD", 0.05)
    source = Source()
    writing = recorder_of(source)
    time.sleep(0.3)
    assert (list(folder.iterdir()), read(wait=False), writing._thread.is_alive()) == ([], "", True)
    full[0] = False
    until = time.monotonic() + 5
    while not list(folder.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.02)
    assert "vllm_dflash_reached_tokens_total{" in read(wait=False)
    writing.close()


def test_the_last_one_takes_the_folder_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It stayed behind after SIGTERM, for the server's first process then ends without its exit
    handlers. A folder that the user named stays."""
    for variable, stays in ((snapshots._OURS, False), (snapshots.USERS, True)):
        monkeypatch.delenv(snapshots.USERS, raising=False)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        source = Source()
        writing = recorder_of(source)
        writing.flush()
        assert len(list((tmp_path / variable).iterdir())) == 1
        writing.close()
        assert (tmp_path / variable).exists() == stays
        assert not list(tmp_path.rglob("*.json"))


def test_a_process_of_multiprocessing_ends_its_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """vLLM's workers are such, and end without ``atexit``."""
    monkeypatch.delenv(snapshots.USERS, raising=False)
    monkeypatch.setenv(snapshots._OURS, str(tmp_path / "ours"))

    def work() -> None:
        source = Source()
        recorder_of(source).flush()
        assert list((tmp_path / "ours").iterdir())

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert (child.exitcode, (tmp_path / "ours").exists()) == (0, False)


def test_folders_of_servers_that_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next engine removes them, but none of a server that lives, nor what only looks like
    one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    names = [f"vllm-dflash-metrics-{pid}-abcd" for pid in (gone, os.getpid(), "x")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"engine-0-{gone}-5.json").write_text("{}")
    snapshots.remove_left_behind()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_server_started_by_a_process_of_vllm_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(snapshots.USERS, raising=False)
    show = (
        "from vllm_dflash.metrics import snapshots as s; s.choose_folder(); print(s.folder(),"
        " flush=True)"
    )
    code = (
        f"import multiprocessing, subprocess, sys; show = {show!r}; exec(show); child ="
        " multiprocessing.get_context('fork').Process(target=exec, args=(show,)); child.start();"
        " child.join(); subprocess.run([sys.executable, '-c', show], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    own, child, server = done.stdout.split()
    assert own == child != server

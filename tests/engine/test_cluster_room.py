"""However a batch ends, the cluster has its room back within seconds, and no process stays.

Stand-ins for the engine. Needs ``pip install 'vllm-dflash[ray]'``.

    pytest -s tests/engine/test_cluster_room.py
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster_workers import StandIn
from engine.cluster_harness import PYTHONPATH, ray_cluster, room_taken, wait_until_free
from vllm_dflash.cluster import batch, connection, room
from vllm_dflash.cluster.batch import Job, complete
from vllm_dflash.cluster.settings import ClusterError, EngineSettings

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
ENGINE = EngineSettings("org/target", device="cpu")
SECONDS = 20
"""For Ray to take back what it is given, on a busy machine."""
AGENTS_S = 120
"""Ray's two agents of a node, where its raylet is killed: they want to tell a driver first."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        yield


@pytest.fixture
def job(tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job of ten parts of which four rows fail, on two replicas; after it everything is free, and
    stays so."""
    import ray

    # It imports vLLM, which the stand-in does not need.
    monkeypatch.setattr(batch, "check_sampling", lambda sampling: None)
    assert ray.available_resources()["CPU"] == 2
    rows = [{"prompt": "wrong" if i < 4 else f"p{i}"} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out" / "_batch").mkdir(parents=True)
    yield Job([str(tmp_path / "in.jsonl")], tmp_path / "out", ENGINE, {}, 2, rows_per_part=4)
    wait_until_free(2)


def test_finished(job: Job) -> None:
    assert complete(job, StandIn)["rows"] == 40


def test_too_many_rows_fail(job: Job) -> None:
    with pytest.raises(ClusterError, match="--max-errors is 1"):
        complete(replace(job, max_errors=1), StandIn)


def test_lost_actors(job: Job) -> None:
    for number in (3, 7):
        (job.out / "_batch" / f"die-on-{number}").touch()
    assert complete(job, StandIn)["rows"] == 40


def test_rows_that_end_every_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were given to one process after another for ever."""
    monkeypatch.setattr(room, "RETRIES", 1)
    (job.out / "_batch" / "always-die-on-5").touch()
    with pytest.raises(ClusterError, match=r"process ended.*What is answered is kept") as kept:
        complete(job, StandIn)
    wait_until_free(2)  # while the error is kept, whose traceback leads to Ray Data's handles
    assert kept.value.__cause__ is not None
    assert not (job.out / "part-000005.jsonl").exists()


def test_a_job_that_was_given_up_takes_no_room_later(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray started its actors once there was room, to end them then, which took half a minute of a
    busy machine; the next job found none."""
    monkeypatch.setattr(connection, "check_room", lambda *args: None)
    monkeypatch.setattr(batch, "_PLACED_S", 5)
    with room_taken(2), pytest.raises(ClusterError, match="2 replicas did not start within 5 s"):
        complete(job, StandIn)
    until = time.monotonic() + 15
    while time.monotonic() < until:
        assert not list((job.out / "_batch").glob("started-*"))
        time.sleep(0.1)


SCRIPT = """
import sys
from pathlib import Path
from cluster_workers import Starting
from vllm_dflash.cluster.batch import Job, complete
from vllm_dflash.cluster.settings import EngineSettings
from vllm_dflash.cluster import batch
batch.check_sampling = lambda sampling: None
given, out = sys.argv[1:]
complete(Job([given], Path(out), EngineSettings("org/target", device="cpu")), Starting)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_an_engine_starts(tmp_path: Path, number: signal.Signals) -> None:
    """On a cluster of its own: of that and of what its actor had started nothing stays. The
    folder of Ray's files is left by SIGKILL alone, after which Ray's agents take a minute."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    out = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        env.pop(name, None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "in.jsonl"), str(out)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    processes, folder = [psutil.Process(driver.pid)], tmp_path
    try:
        child = child_of(driver, out, tmp_path / "log")
        processes += processes[0].children(recursive=True)
        assert child in {process.pid for process in processes}
        named = [re.search(r"/tmp/ray-\w+", argument) for p in processes for argument in cmdline(p)]
        (folder,) = {Path(found.group()) for found in named if found is not None}
        agents = [process for process in processes if "Agent" in "".join(cmdline(process))]
        others = [process for process in processes[1:] if process not in agents]
        driver.send_signal(number)
        driver.wait(60)
        _, left = psutil.wait_procs(others, timeout=SECONDS)
        assert [cmdline(process) for process in left if running(process)] == []
        _, left = psutil.wait_procs(agents, timeout=AGENTS_S if number == signal.SIGKILL else 5)
        assert [cmdline(process) for process in left if running(process)] == []
        assert folder.exists() == (number == signal.SIGKILL)
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait(10)
        if folder != tmp_path:
            shutil.rmtree(folder, ignore_errors=True)


def child_of(driver: subprocess.Popen[bytes], out: Path, log: Path) -> int:
    """The process that the actor has started, once its engine has been starting for a second."""
    path = out / "_batch" / "child"
    until = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)
    time.sleep(1)
    return int(path.read_text())


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def running(process: psutil.Process) -> bool:
    """One that nobody waits for any more has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""What a cluster lacks is said within a minute and with the remedy: real nodes, one of which is
another machine as far as it can tell.

Needs ``pip install 'vllm-dflash[ray]'``; the node that differs needs root, for a file system of its
own.

    pytest -s tests/engine/test_cluster_errors.py
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cluster_harness import ray_cluster
from engine.harness import DRAFTER, TARGET
from vllm_dflash.cluster import connection
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.supported import installed_vllm

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
ENGINE = EngineSettings(str(TARGET), str(DRAFTER), "cpu", 7)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        yield


@pytest.fixture(autouse=True)
def within_a_minute() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


def test_no_room() -> None:
    with pytest.raises(
        ClusterError, match=r"no room: 9 CPU are needed, 2 CPU of 2 CPU are free .* fewer replicas"
    ):
        connection.check_room(ENGINE.bundles * 9, seconds=5)
    connection.check_room(ENGINE.bundles * 2, seconds=20)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match=r"1 GPU, 1 CPU are needed"):
        connection.check_room(EngineSettings(str(TARGET)).bundles, seconds=5)


def test_this_node_is_fit() -> None:
    connection.check_nodes(ENGINE)


def test_a_node_with_another_vllm_and_without_the_drafter(tmp_path: Path) -> None:
    """The second node has a file system of its own, in which an empty folder lies over the drafter,
    and another vLLM's metadata."""
    if (
        os.geteuid() != 0
        or shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "true"], check=False).returncode
    ):
        pytest.skip("unshare -m is not allowed here")
    drafter = tmp_path / "drafter"
    shutil.copytree(DRAFTER, drafter)
    (tmp_path / "empty").mkdir()
    metadata = tmp_path / "site" / "vllm-0.31.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n")
    address = ray.get_runtime_context().gcs_address
    start = (
        f"mount --bind {tmp_path}/empty {drafter} && exec {Path(sys.executable).with_name('ray')}"
        f" start --address={address} --num-cpus=1 --block"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/site", "RAY_AUTH_MODE": "token"}
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", start],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 45
        while sum(each["Alive"] for each in ray.nodes()) < 2:
            assert node.poll() is None, node.stdout.read()
            assert time.monotonic() < until, "the second node does not come"
            time.sleep(0.2)
        with pytest.raises(ClusterError) as error:
            connection.check_nodes(EngineSettings(str(TARGET), str(drafter), "cpu", 7))
    finally:
        node.terminate()
        node.wait(30)
    print(f"\n{error.value}")
    assert f"vLLM is 0.31.0, here it is {installed_vllm().partition('+')[0]}" in str(error.value)
    assert f"the draft {drafter} is not there: put it on every node" in str(error.value)
    assert str(error.value).count("\n  node ") == 2


def test_no_cluster_at_the_address() -> None:
    code = (
        "from vllm_dflash.cluster.connection import connect\nfrom vllm_dflash.cluster.settings"
        " import ClusterError, EngineSettings\ntry:\n    with connect(EngineSettings('org/target',"
        " device='cpu'), 1): pass\nexcept ClusterError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "no cluster answers at RAY_ADDRESS=127.0.0.1:9" in done.stdout, done.stderr[-2000:]


def test_ray_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}')
    code = (
        "import sys\nsys.modules['ray'] = None\nfrom vllm_dflash.cli import main\nraise"
        " SystemExit(main(['batch', 'in.jsonl', '--out', 'out', '--target', 'org/target',"
        " '--device', 'cpu']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Ray is not installed" in done.stderr
    assert "pip install 'vllm-dflash[ray]'" in done.stderr
    assert not list(tmp_path.rglob("inputs.json")), "a run that never began has its folder"

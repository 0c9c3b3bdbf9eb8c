"""Ray clusters for tests: small, with their files in a folder of their own, and ended with the
test."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.harness import ROOT

PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/plugin_report"))
PLATFORM = str(ROOT / "tests" / "ray_platform")


@contextmanager
def ray_cluster(*, platform: bool = False, **resources: Any) -> Iterator[None]:
    """A cluster on this machine that this process is connected to; ``platform`` has vLLM take its
    logical GPUs for devices."""
    import ray

    # Its sockets' paths have a limit of 107 characters, which pytest's folders pass.
    folder = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")
    path = os.pathsep.join([PLATFORM, PYTHONPATH]) if platform else PYTHONPATH
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ADDRESS")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, before["PYTHONPATH"]]))
    os.environ.pop("RAY_ADDRESS", None)
    try:
        ray.init(
            address="local",
            log_to_driver=False,
            include_dashboard=False,
            _temp_dir=folder,
            **resources,
        )
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def room_taken(num_cpus: int) -> Iterator[None]:
    """Another job has so much of the cluster meanwhile."""
    import ray

    @ray.remote(num_cpus=num_cpus)
    class Other:
        def here(self) -> None: ...

    other = Other.remote()
    ray.get(other.here.remote())
    try:
        yield
    finally:
        ray.kill(other)


def wait_until_free(num_cpus: int, seconds: float = 20) -> None:
    """Until the cluster has all of its room back, and no actor with a name; then they stay away for
    a second. Ray takes some time for it on a busy machine."""
    import ray

    until = time.monotonic() + seconds
    while ray.util.list_named_actors() or ray.available_resources().get("CPU") != num_cpus:
        assert time.monotonic() < until, (ray.util.list_named_actors(), ray.available_resources())
        time.sleep(0.1)
    time.sleep(1)
    assert ray.available_resources()["CPU"] == num_cpus


def plugin_processes(folder: Path) -> dict[str, bool]:
    """The running processes that loaded vLLM's plug-ins with ``tests/plugin_report``, by Ray's or
    vLLM's name for them: whether ours had registered its drafter there."""
    found = {}
    for path in folder.glob("*.json"):
        try:
            title = Path("/proc", path.stem, "cmdline").read_text().replace("\0", " ").strip()
        except FileNotFoundError:
            continue
        if title:
            found[f"{title[:90]} ({path.stem})"] = json.loads(path.read_text())[
                "drafter"
            ].startswith("vllm_dflash.")
    return found

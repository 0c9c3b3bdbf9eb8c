"""A connection to Ray, checked before anything is started: every node has the same versions and the
checkpoints, and there is room.

The cluster is the one of RAY_ADDRESS, or one on this machine that ends with the command. Limits:
what a node lacks is found on the nodes that are there at the start; those that an autoscaler adds
later are not looked at.

    pytest tests/engine/test_cluster_errors.py
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm_dflash
from vllm_dflash.api_keys import VARIABLE
from vllm_dflash.cluster.settings import (
    ClusterError,
    EngineSettings,
    engine_args,
    environment,
    uses_ray,
)
from vllm_dflash.supported import installed_vllm

INSTALL = "pip install 'vllm-dflash[ray]'"
SECONDS = 30.0
"""How long nodes may take to answer, and an autoscaler or another job to make room."""
_OVER_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch, read when it is imported: with 0 a cluster on this machine listens on 127.0.0.1
alone, on Linux too. vLLM's executor on Ray looks for nodes by another address, so it is not set
where an engine has one."""
_OF_ONE_NODE = ("VLLM_HOST_IP", "VLLM_PORT", "VLLM_DP_", "VLLM_LOCAL_RANK")


@contextmanager
def connect(
    engine: EngineSettings,
    replicas: int,
    seconds: float = SECONDS,
    extra: list[dict[str, float]] | None = None,
    dashboard: bool = False,
) -> Iterator[dict[str, Any]]:
    """Connects, checks, and yields the ``runtime_env`` that every actor of an engine needs;
    ``extra`` are bundles beside the engines'.

    Raises:
        ClusterError: no Ray, no such cluster, nodes that differ or lack a checkpoint, or no room
            within ``seconds``.
    """
    with _here_alone("RAY_ADDRESS" not in os.environ and not uses_ray(engine)):
        ray = _import_ray()
        ours, folder = not ray.is_initialized(), None
        if ours:
            folder = _init(ray, dashboard)
    try:
        check_nodes(engine, seconds)
        check_room(engine.bundles * replicas + (extra or []), seconds)
        yield {"env_vars": variables(engine)}
    finally:
        if ours:
            ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _here_alone(wanted: bool) -> Iterator[None]:
    """Has a cluster that is started meanwhile listen on this machine alone, where that is wanted
    and the user has not said otherwise; what this process starts later is not changed."""
    set_here = wanted and _OVER_MACHINES not in os.environ
    if set_here:
        os.environ[_OVER_MACHINES] = "0"
    try:
        yield
    finally:
        if set_here:
            os.environ.pop(_OVER_MACHINES, None)


def variables(engine: EngineSettings) -> dict[str, str]:
    """vLLM's own variables, as they are set here, for the processes on all nodes; not the API key,
    as Ray logs and shows what it is given."""
    given = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not name.startswith(_OF_ONE_NODE)
    }
    given.pop(VARIABLE, None)
    if uses_ray(engine):
        import ray

        # vLLM's engine process is no Ray worker: without it, it would start a cluster of its own.
        given["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return environment(engine) | given


def check_nodes(engine: EngineSettings, seconds: float = SECONDS) -> None:
    """Asks every node for its versions and checkpoints.

    Raises:
        ClusterError: one does not answer, or is not as this process is; it is named, with the
            remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    paths, here = engine.local_paths, describe(engine.local_paths)
    ask = ray.remote(num_cpus=0, max_retries=0)(describe)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths): _name(node)
        for node in ray.nodes()
        if node["Alive"]
    }
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    problems = [
        f"{asked[ref]} does not answer within {seconds:.0f} s: look at `ray status`"
        for ref in silent
    ]
    for ref in ready:
        try:
            problems += [f"{asked[ref]}: {problem}" for problem in differences(here, ray.get(ref))]
        except Exception as error:  # Ray wraps a task's error in classes of its own
            problems.append(
                f"{asked[ref]}: {_last_line(error)}; install this version of vllm-dflash on every"
                f" node ({INSTALL})"
            )
    if problems:
        raise ClusterError("the nodes are not all fit:\n  " + "\n  ".join(problems))


def describe(paths: Mapping[str, str]) -> dict[str, Any]:
    """What a node has: versions, and a digest of each checkpoint's config.json (None: it is not
    there). Runs on every node."""
    return {
        "versions": {
            "vLLM": installed_vllm(),
            "vllm-dflash": vllm_dflash.__version__,
            "ray": importlib.metadata.version("ray"),
            "Python": ".".join(platform.python_version_tuple()[:2]),
        },
        "checkpoints": {
            name: (path, _digest(Path(path) / "config.json")) for name, path in paths.items()
        },
    }


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What keeps a node from doing what this process is set up for, with the remedy."""
    problems = [
        f"{name} is {there['versions'].get(name) or 'not installed'}, here it is {version}: install"
        " the same on every node"
        for name, version in here["versions"].items()
        if there["versions"].get(name) != version
    ]
    for name, (path, digest) in here["checkpoints"].items():
        found = there["checkpoints"][name][1]
        if found is None:
            problems.append(
                f"the {name} {path} is not there: put it on every node under that path, or give a"
                " hub id"
            )
        elif found != digest:
            problems.append(
                f"the {name} {path} is another one (its config.json differs): copy the same to"
                " every node"
            )
    return problems


def check_room(bundles: list[dict[str, float]], seconds: float = SECONDS) -> None:
    """Reserves everything at once, which also tells an autoscaler what is wanted, and gives it
    back.

    Raises:
        ClusterError: it is not free within ``seconds``.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(bundles, strategy="PACK")
    try:
        ready = group.wait(seconds)
    finally:
        remove_placement_group(group)
    if not ready:
        raise ClusterError(
            f"the cluster has no room: {_sum(bundles)} are needed,"
            f" {_sum([ray.available_resources()])} of {_sum([ray.cluster_resources()])} are free"
            f" (waited {seconds:.0f} s). Ask for fewer replicas, end other jobs, or add nodes"
        )


def check_engine(
    engine: EngineSettings, runtime_env: Mapping[str, Any], seconds: float = 4 * SECONDS
) -> None:
    """Has vLLM make an engine's configuration where one will run, without starting it: what it
    refuses, it refuses here and at once.

    Raises:
        ClusterError: vLLM or this package refuses the pair or a setting.
    """
    import ray

    resources = {f"num_{kind.lower()}s": number for kind, number in engine.bundles[0].items()}
    task = ray.remote(max_retries=0, runtime_env=dict(runtime_env), **resources)(_make_config)
    try:
        ray.get(task.remote(engine_args(engine)), timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(
            f"vLLM has not made its configuration within {seconds:.0f} s: look at `ray status`"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise ClusterError(f"vLLM refuses this engine: {error.cause}") from None


def _make_config(args: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    EngineArgs(**args).create_engine_config()


def check_installed() -> None:
    """Refuses to begin without Ray; nothing is imported.

    Raises:
        ClusterError: it is not there.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(f"Ray is not installed: {INSTALL}")


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.serve
    except ImportError as error:
        raise ClusterError(f"Ray is not installed, or not all of it ({error}): {INSTALL}") from None
    return ray


def _init(ray: Any, dashboard: bool) -> str | None:
    """Connects to RAY_ADDRESS, or starts a cluster here; returns the folder of the latter's files
    where it is ours to remove."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False)
        except Exception as error:
            raise ClusterError(
                f"no cluster answers at RAY_ADDRESS={address} ({_last_line(error)}): start it, or"
                " unset RAY_ADDRESS to use this machine. A cluster with tokens needs"
                " RAY_AUTH_MODE=token here"
            ) from None
        return None
    # Its sockets' paths have a limit of 107 characters; its default place is shared by all users.
    folder = None if "RAY_TMPDIR" in os.environ else tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        ray.init(
            address="local", log_to_driver=False, include_dashboard=dashboard, _temp_dir=folder
        )
    except BaseException as error:  # Ctrl-C too: a cluster that is half there
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise ClusterError(
            f"Ray does not start here ({_last_line(error)}). It gives itself half a minute, which a"
            " busy machine can miss: try again, or start it with `ray start --head` and set"
            " RAY_ADDRESS to its address"
        ) from None
    return folder


def _knock(address: str) -> None:
    """Ray waits for minutes where nobody listens: an OSError where that is so at HOST:PORT; other
    forms of address are Ray's to read."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _sum(resources: list[Any]) -> str:
    kinds = {kind: sum(each.get(kind, 0) for each in resources) for kind in ("GPU", "CPU")}
    return ", ".join(f"{number:g} {kind}" for kind, number in kinds.items() if number) or "nothing"

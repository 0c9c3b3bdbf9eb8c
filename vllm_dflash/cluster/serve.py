"""``vllm-dflash up``: an OpenAI-compatible deployment on Ray Serve LLM. What is ours is the
configuration, and the checks before it is tried.

Replicas are added and taken away by the requests in flight on each, replaced when their health
check fails, and finish what they have when they stop. Limits: one model a deployment.

    vllm-dflash up --target T --draft D --replicas 1,8
    pytest tests/engine/test_cluster_serve.py
"""

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash.api_keys import VARIABLE, is_local
from vllm_dflash.cluster.access import digest_of
from vllm_dflash.cluster.command import settings_of
from vllm_dflash.cluster.connection import check_engine, connect
from vllm_dflash.cluster.settings import ClusterError, EngineSettings, engine_args, environment
from vllm_dflash.flag_types import MOST_AT_ONCE
from vllm_dflash.swap.endpoint import WORKER

APPLICATION = "vllm-dflash"
_HEALTH = {"health_check_period_s": 5, "health_check_timeout_s": 30}
_DRAIN = {"graceful_shutdown_wait_loop_s": 1, "graceful_shutdown_timeout_s": 120}
"""Seconds: a replica that is to stop takes no new request, and is ended once it has none or the
time is over."""
_ATTEMPTS = 2
"""To start a replica, before the deployment counts as failed; Ray's own 20 are half an hour of
silence."""
_REPLICAS_PER_INGRESS = 8


@dataclass(frozen=True)
class Serving:
    """A deployment."""

    engine: EngineSettings
    name: str
    """Of the model, for clients."""
    replicas: tuple[int, int] = (1, 1)
    """At least and at most."""
    requests_per_replica: int = 32
    """In flight on each, above which one more is started; a replica takes twice as many before
    requests queue at the ingress."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_digest: str | None = None
    """Of the key that requests must bring; None asks for none."""
    swap_from: str | None = None
    """The folder, on every node, that drafters may be swapped in from; None: none are."""


def run(args: argparse.Namespace) -> int:
    """The command; 0 where it was stopped or left running, 1 where it could not run."""
    try:
        serving = serving_of(args)
        if args.print_config:
            print(as_yaml(serving), end="")
            return 0
        warning = exposure(serving)
        if warning is not None:
            print(f"vllm-dflash up: {warning}", file=sys.stderr)
        if args.detach and not os.environ.get("RAY_ADDRESS"):
            raise ClusterError(
                "--detach leaves the deployment on a running cluster: set RAY_ADDRESS, or leave"
                " --detach out"
            )
        up(serving, args.detach)
    except ClusterError as error:
        print(f"vllm-dflash up: {error}", file=sys.stderr)
        return 1
    return 0


def serving_of(args: argparse.Namespace) -> Serving:
    """The deployment that the flags describe.

    Raises:
        ClusterError: a value that cannot be.
    """
    try:
        counts = [int(number) for number in args.replicas.split(",")]
        if not 1 <= len(counts) <= 2 or not 0 < counts[0] <= counts[-1] <= MOST_AT_ONCE:
            raise ValueError
    except ValueError:
        raise ClusterError(
            f"--replicas is {args.replicas!r}: give a number such as 2, or the least and the most"
            f" such as 1,8, up to {MOST_AT_ONCE}"
        ) from None
    name = args.name or args.target
    digest, swap_from = digest_of(args.api_key, os.environ), args.swap_from
    if swap_from is not None and args.draft is None:
        raise ClusterError("--swap-from is set, but no drafter is served: give one with --draft")
    if swap_from is not None and digest is None and not is_local(args.host):
        raise ClusterError(
            f"--swap-from lets clients change what serves, --host {args.host} is an address that"
            " other machines reach, and the endpoint asks nobody for a key: give one by"
            f" {VARIABLE} or --api-key, or leave --host at 127.0.0.1"
        )
    return Serving(
        settings_of(args),
        name,
        (counts[0], counts[-1]),
        args.requests_per_replica,
        args.host,
        args.port,
        digest,
        None if swap_from is None else str(Path(swap_from).resolve()),
    )


def exposure(serving: Serving) -> str | None:
    """What to say of an address that others than this machine reach without a key; None for the
    loopback, or with one."""
    if is_local(serving.host) or serving.api_key_digest is not None:
        return None
    return (
        f"--host {serving.host} is an address that other machines reach, and the endpoint asks"
        f" nobody for a key: give one by {VARIABLE} or --api-key, keep it behind a firewall, or"
        " leave --host at 127.0.0.1 (docs/cluster.md, Who can reach it)"
    )


def app_args(serving: Serving, env_vars: dict[str, str]) -> dict[str, Any]:
    """The arguments of ``ray.serve.llm:build_openai_app``; plain data, for a config file too."""
    args = engine_args(serving.engine)
    if serving.swap_from is not None:
        args = {"worker_extension_cls": WORKER} | args
    least, most = serving.replicas
    count: dict[str, Any] = {"num_replicas": least}
    if least < most:
        count = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": serving.requests_per_replica,
            }
        }
    model = {
        "model_loading_config": {"model_id": serving.name, "model_source": args.pop("model")},
        "engine_kwargs": args,
        "deployment_config": {
            **count,
            **_HEALTH,
            **_DRAIN,
            "max_ongoing_requests": 2 * serving.requests_per_replica,
            "max_constructor_retry_count": _ATTEMPTS,
            # Ray adds it to the first bundle, which has room for the front end already.
            "ray_actor_options": {"num_cpus": 0},
        },
        "placement_group_config": {"bundles": serving.engine.bundles},
        "server_cls": "vllm_dflash.cluster.replica:Replica",
        "runtime_env": {"env_vars": env_vars},
    }
    if serving.engine.device == "cpu":
        model["accelerator_config"] = {"kind": "cpu"}
    ingress: dict[str, Any] = {"ingress_cls": "vllm_dflash.cluster.replica:Ingress"}
    extra: dict[str, Any] = {}
    if serving.api_key_digest is not None:
        extra["api_key_digest"] = serving.api_key_digest
    if serving.swap_from is not None:
        extra |= {"swap_from": serving.swap_from, "drafter": first_drafter(args)}
        extra["deployment"] = serving.name
    if extra:
        ingress["ingress_extra_kwargs"] = extra
    return {
        "llm_configs": [model],
        "ingress_cls_config": ingress,
        "ingress_deployment_config": {
            **_HEALTH,
            **_DRAIN,
            "ray_actor_options": {"num_cpus": _ingress_cpus(serving)},
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": math.ceil(most / _REPLICAS_PER_INGRESS),
            },
        },
    }


def first_drafter(args: Mapping[str, Any]) -> str:
    """The drafter of an engine's arguments; empty where it has none."""
    return str((args.get("speculative_config") or {}).get("model", ""))


def _ingress_cpus(serving: Serving) -> int:
    """A core of its own beside GPUs, of which none is short; on a CPU it would be an engine's."""
    return 0 if serving.engine.device == "cpu" else 1


def as_yaml(serving: Serving) -> str:
    """A Serve config: for ``serve deploy``, or as serveConfigV2 of a RayService."""
    import yaml

    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": app_args(serving, environment(serving.engine)),
    }
    config = {
        "http_options": {"host": serving.host, "port": serving.port},
        "applications": [application],
    }
    return yaml.safe_dump(config, sort_keys=False)


def up(serving: Serving, detach: bool = False, stop: threading.Event | None = None) -> None:
    """Deploys it, and serves until ``stop`` is set or a signal comes; with ``detach`` returns once
    it is ready.

    Raises:
        ClusterError: the cluster cannot run it.
    """
    ingress = [{"CPU": 1.0}] * _ingress_cpus(serving)
    with connect(serving.engine, serving.replicas[0], extra=ingress, dashboard=True) as runtime_env:
        from ray import serve
        from ray.serve.llm import build_openai_app
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        check_engine(serving.engine, runtime_env)
        serve.start(http_options={"host": serving.host, "port": serving.port})
        _end_swaps(serving)  # of a deployment before
        try:
            print(f"starting {serving.replicas[0]} replicas of {serving.name}", flush=True)
            serve.run(
                build_openai_app(app_args(serving, runtime_env["env_vars"])),
                name=APPLICATION,
                route_prefix="/",
            )
        except BaseException as error:  # Ctrl-C too: Serve's actors stay without their driver
            serve.delete(APPLICATION)
            if not isinstance(error, Exception):
                raise
            raise ClusterError(f"the replicas do not start: {error}") from None
        print(f"serving {serving.name} at http://{serving.host}:{serving.port}/v1", flush=True)
        if detach:
            return
        _wait(stop or threading.Event())
        print("stopping: requests in flight are finished first", flush=True)
        serve.shutdown()
        _end_swaps(serving)


def _end_swaps(serving: Serving) -> None:
    if serving.swap_from is not None:
        from vllm_dflash.swap.on_ray import end_turns

        end_turns(serving.name)


def _wait(stop: threading.Event) -> None:
    """Until it is set, or the process is asked to end."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1):
        pass

"""The two kinds of process of a deployment that Ray starts, each of which loads vLLM's plug-ins, ours among them, before anything else.

vLLM itself loads them in its engine cores and workers; Ray's replicas and ingress read configurations and checkpoints without. Named in the
Serve config as strings, so this is imported where they run, and nowhere else.

    pytest tests/engine/test_cluster_serve.py
"""

from typing import Any

from ray import serve
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress
from vllm.plugins import load_general_plugins

from vllm_dflash.cluster.access import admits, refuse
from vllm_dflash.cluster.orphans import tie_children
from vllm_dflash.metrics.on_ray import RayExporter


class Replica(LLMServer):
    """An engine's front end, whose metrics go to Ray."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        load_general_plugins()
        await super().__init__(*args, **kwargs)
        self._tied = tie_children()
        self._exporter = RayExporter(serve.get_replica_context().replica_id.unique_id)


class Ingress(OpenAiIngress):
    """The HTTP side, which answers those who bring the API key, where there is one."""

    def __init__(self, *args: Any, api_key_digest: str | None = None, **kwargs: Any) -> None:
        load_general_plugins()
        super().__init__(*args, **kwargs)
        self._api_key_digest = api_key_digest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One HTTP request: Ray Serve calls its replica with it, whatever its path, and its own class, next in line, routes it."""
        if self._api_key_digest is not None and not admits(self._api_key_digest, scope):
            await refuse(scope, send)
        else:
            await super().__call__(scope, receive, send)

"""The two kinds of process of a deployment that Ray starts, each of which loads vLLM's plug-ins,
ours among them, before anything else.

vLLM itself loads them in its engine cores and workers; Ray's replicas and ingress read
configurations and checkpoints without. Named in the Serve config as strings, so this is imported
where they run, and nowhere else.

    pytest tests/engine/test_cluster_serve.py
"""

import asyncio
from typing import Any

from ray import serve
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress
from vllm.plugins import load_general_plugins

from vllm_dflash.cluster.access import Guard
from vllm_dflash.cluster.orphans import Tie
from vllm_dflash.cluster.serve import first_drafter
from vllm_dflash.metrics.on_ray import RayExporter
from vllm_dflash.swap.endpoint import WORKER
from vllm_dflash.swap.on_ray import RolloutEndpoint, follow


class Replica(LLMServer):
    """An engine's front end, whose metrics go to Ray."""

    # Ray Serve awaits it.
    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        load_general_plugins()
        self._tied = Tie()
        try:
            await super().__init__(*args, **kwargs)
        finally:
            self._tied.all_started()
        replica = serve.get_replica_context().replica_id.unique_id
        self._exporter = RayExporter(replica)
        engine = self._llm_config.engine_kwargs
        if engine.get("worker_extension_cls") == WORKER:
            name, client = self._llm_config.model_id, self.engine._engine_client
            self._following = asyncio.create_task(
                follow(client, name, first_drafter(engine), replica)
            )


class Ingress(OpenAiIngress):
    """The HTTP side, which answers those who bring the API key, where there is one."""

    def __init__(
        self,
        *args: Any,
        api_key_digest: str | None = None,
        swap_from: str | None = None,
        drafter: str = "",
        deployment: str = "",
        **kwargs: Any,
    ) -> None:
        load_general_plugins()
        super().__init__(*args, **kwargs)
        self._api_key_digest, self._guarded = api_key_digest, False
        self._swaps = (
            None
            if swap_from is None
            else {"deployment": deployment, "first": drafter, "folder": swap_from}
        )

    def _set_asgi_app(self, app: Any) -> None:
        """Ray Serve's own, next in line, takes the app that routes requests; it refuses classes
        with a ``__call__``."""
        if self._swaps is not None:
            has_key = self._api_key_digest is not None
            app.add_middleware(RolloutEndpoint, has_key=has_key, **self._swaps)
        if self._api_key_digest is not None:  # the last one stands before the others
            app.add_middleware(Guard, digest=self._api_key_digest)
            self._guarded = True
        super()._set_asgi_app(app)

    async def check_health(self) -> None:
        """Ray serves nothing before it has passed: a Ray that no longer calls the method above must
        not serve without the key."""
        if self._api_key_digest is not None and not self._guarded:
            raise RuntimeError(
                "this Ray gives the ingress no place to ask for the API key: leave --api-key out,"
                " or use Ray 2.60"
            )
        await super().check_health()

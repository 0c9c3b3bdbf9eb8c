"""API server: /metrics also shows what our recorders have counted."""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.log import logger
from vllm_dflash.patch import Patch


def _replace(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """No drafter is asked for: an API server's process does not know its engines'."""

    @wraps(original)
    def attach_router(app: Any) -> None:
        original(app)
        try:
            _add_ours(app)
        except Exception:  # what watches must not end what serves
            logger.exception("vllm-dflash's metrics: left out of /metrics; serving goes on")

    return attach_router


def _add_ours(app: Any) -> None:
    from prometheus_client import REGISTRY, make_asgi_app
    from starlette.routing import Mount
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    from vllm_dflash.metrics.read import DFlashCollector

    registry = get_prometheus_registry()
    # With one API server it is the process's own registry, and another app of this process may
    # have been here.
    if not any(
        isinstance(collector, DFlashCollector) for collector in registry._collector_to_names
    ):
        registry.register(DFlashCollector())
    if registry is not REGISTRY:
        route = Mount("/metrics", make_asgi_app(registry=registry))
        route.path_regex = re.compile("^/metrics(?P<path>.*)$")
        app.routes.insert(0, route)


PATCH = Patch(
    target="vllm.entrypoints.serve.instrumentator.metrics:attach_router",
    needs="optional",
    fingerprints={"vllm.v1.metrics.prometheus:get_prometheus_registry": "1dd5aec854c0a47f"},
    signatures={"vllm.entrypoints.serve.instrumentator.metrics:attach_router": "app"},
    why=(
        "a stat-logger plug-in can register collectors in the process's registry, but with several"
        " API servers, or a PROMETHEUS_MULTIPROC_DIR of the user's, /metrics is answered from a"
        " registry that is made anew for each scrape and reads prometheus-client's files and"
        " nothing else; there a route that answers from those files and ours goes before it"
    ),
    until="vLLM lets a plug-in add a collector to the registry that /metrics answers from",
    replace=_replace,
)

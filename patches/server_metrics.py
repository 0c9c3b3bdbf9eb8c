"""API server: /metrics also shows what our recorders have counted."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: Callable[[], Any]) -> Callable[[], Any]:
    @wraps(original)
    def get_prometheus_registry() -> Any:
        from vllm_dflash.metrics.read import DFlashCollector

        registry = original()
        # With one API server it is the process's own registry, and another app of this process may have been here.
        if not any(isinstance(collector, DFlashCollector) for collector in registry._collector_to_names):
            registry.register(DFlashCollector())
        return registry

    return get_prometheus_registry


PATCH = Patch(
    target="vllm.entrypoints.serve.instrumentator.metrics:get_prometheus_registry",
    versions=SUPPORTED_VLLM,
    fingerprints={
        "vllm.v1.metrics.prometheus:get_prometheus_registry": "1dd5aec854c0a47f",
        "vllm.entrypoints.serve.instrumentator.metrics:attach_router": "a93bb4984b37fcf4",
    },
    why=(
        "a stat-logger plug-in can register collectors in the process's registry, but with several API servers, or a PROMETHEUS_MULTIPROC_DIR "
        "of the user's, vLLM answers from a registry of its own, which reads prometheus-client's files and nothing else"
    ),
    until="vLLM lets a plug-in add a collector to the registry that /metrics answers from",
    replace=_replace,
)

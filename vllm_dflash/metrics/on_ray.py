"""Our metrics on Ray's own metrics port, where a replica of Ray Serve has no /metrics: Prometheus
finds the ports by Ray's service discovery.

Each sample is a gauge of Ray's with the sample's own name and labels (Ray puts ``ray_`` before the
name) and ``ReplicaId``, as vLLM's own metrics have there. A counter or bucket stays a sum that
grows, so ``rate()`` holds; ``monitoring/prometheus/ray.yml`` takes the prefix off again.

    python tests/prove_serve.py kill
"""

import threading
import time

from ray.util.metrics import Gauge

from vllm_dflash.log import logger
from vllm_dflash.metrics.read import DFlashCollector

PERIOD = 5.0
"""Seconds; Ray's own agents report every ten."""


class RayExporter:
    """Writes this process's engines' metrics to Ray for as long as it lives."""

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._gauges: dict[str, Gauge] = {}
        threading.Thread(target=self._run, name="vllm-dflash-metrics", daemon=True).start()

    def export(self) -> None:
        """Writes what the engines have counted so far."""
        for family in DFlashCollector().collect():
            for sample in family.samples:
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = self._gauges[sample.name] = Gauge(
                        sample.name, family.documentation, (*sample.labels, "ReplicaId")
                    )
                gauge.set(sample.value, sample.labels | {"ReplicaId": self._replica_id})

    def _run(self) -> None:
        while True:
            try:
                self.export()
            # The next time it may be well; a thread that ends would leave figures that stand still.
            except Exception as error:
                logger.warning("metrics were not given to Ray: %r", error)
            time.sleep(PERIOD)

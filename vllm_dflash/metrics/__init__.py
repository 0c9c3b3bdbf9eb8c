"""Whether speculation pays, as Prometheus metrics: docs/monitoring.md. ``from
vllm_dflash.metrics.read import read`` for offline use."""

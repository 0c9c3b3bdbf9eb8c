"""The Grafana dashboard as code: ``python -m monitoring.dashboard.build``."""

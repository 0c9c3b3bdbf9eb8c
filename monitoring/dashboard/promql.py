"""PromQL in pieces: rates, means, quantiles and shares of what the dashboard's variables select,
none of them ever NaN.

A division by a rate that is zero, an idle server's, is NaN, which Grafana draws as a gap here and
as a line there and which no comparison of an alert survives. So every denominator is filtered by
``> 0``: idle gives no sample at all.

    pytest tests/unit/test_monitoring.py
"""

SELECTED = 'instance=~"$instance",model_name=~"$model",engine=~"$engine"'
WINDOW = "$__rate_interval"
BY_ENGINE = "instance, model_name, engine"
"""An engine's number is its own server's: several servers have an engine 0."""
EACH = "{{instance}} {{model_name}} engine {{engine}}"


def selector(metric: str, where: str = "") -> str:
    """The series of a metric that the variables select; ``where`` adds matchers."""
    return f"{metric}{{{SELECTED}{',' if where else ''}{where}}}"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, summed over all labels but ``by`` (comma-separated)."""
    return f"sum{_by(by)} (rate({selector(metric, where)}[{WINDOW}]))"


def ratio(numerator: str, denominator: str, on: str | None = None, many: bool = False) -> str:
    """No sample where the denominator is zero. ``on``: the labels to match by; ``many``: several
    numerators to one denominator."""
    matching = "" if on is None else f" on ({on})" + (" group_left ()" if many else "")
    return f"{numerator} /{matching} ({denominator} > 0)"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    """The mean of what a histogram observed."""
    return ratio(rate(f"{histogram}_sum", by, where), rate(f"{histogram}_count", by, where))


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """The q-quantile of what a histogram observed; no sample where it observed nothing."""
    buckets = rate(f"{histogram}_bucket", f"{by}, le" if by else "le", where)
    return f"histogram_quantile({q}, {buckets}) and {rate(f'{histogram}_count', by, where)} > 0"


def share(metric: str, by: str, where: str = "") -> str:
    """Each label's part of the whole, 0 to 1."""
    return ratio(rate(metric, by, where), rate(metric, "", where), on="", many=True)


def last_of_path(expression: str, label: str) -> str:
    """The same with the last part of a label that is a path or an id of a hub: all that a tile has
    room for."""
    return f'label_replace({expression}, "{label}", "$1", "{label}", ".*/([^/]+)/*")'


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""

"""Reads what engines have counted: for vLLM's /metrics, and for offline use.

from vllm_dflash.metrics.read import read
print(read())    # after llm.generate(...), in the process that made the LLM

pytest tests/unit/test_metrics.py tests/engine/test_metrics.py
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vllm_dflash.log import logger
from vllm_dflash.metrics import catalog, recorder, snapshots
from vllm_dflash.prompts import surrogate
from vllm_dflash.records import AtLeast, misfit

_told: list[str] = []
_FAMILIES = {
    catalog.COUNTER: CounterMetricFamily,
    catalog.GAUGE: GaugeMetricFamily,
    catalog.HISTOGRAM: HistogramMetricFamily,
}


class DFlashCollector(Collector):
    """All our metrics of this server's engines; none where no engine has one of our drafters."""

    def collect(self) -> Iterator[Metric]:
        recorder.flush_here()
        return families(snapshots.read_all())

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: registering reads no files."""
        return ()


def families(found: Iterable[dict[str, Any]]) -> Iterator[Metric]:
    """Snapshots as prometheus-client's metric families, in the catalog's order."""
    found = list(found)
    for short, metric in catalog.BY_NAME.items():
        series: dict[tuple[str, ...], Any] = {}
        for each in found:
            for sample in each["samples"].get(short, ()):
                if _fits(metric, each, sample):
                    labels = tuple(map(str, (*each["labels"], *sample[0])))
                    series[labels] = _both(metric, series.get(labels), sample[1])
        if not series:
            continue
        name = metric.name.removesuffix("_total")
        family = _FAMILIES[metric.kind](name, metric.help, labels=metric.label_names)
        for labels, value in series.items():
            if metric.kind == catalog.HISTOGRAM:
                family.add_metric(labels, *_cumulative(metric.buckets, *value))
            else:
                family.add_metric(labels, value)
        yield family


def _both(metric: catalog.Metric, one: Any, other: Any) -> Any:
    """One series' value, of which two processes that live have written: Prometheus takes no series
    twice."""
    if one is None:
        return other
    if not _told:
        _told.append(metric.name)
        logger.warning(
            "two servers leave their metrics in %s under one model name and engine: their counts"
            " are added up, and each server's /metrics has both; give each server a folder of its"
            " own, or none",
            snapshots.folder(),
        )
    if metric.kind == catalog.COUNTER:
        return one + other
    if metric.kind == catalog.HISTOGRAM:
        counts = [a + b for a, b in zip(one[0], other[0], strict=True)]
        return [counts, one[1] + other[1]]
    return other


def _fits(metric: catalog.Metric, snapshot: dict[str, Any], sample: Any) -> bool:
    """Whether a sample is one of this metric: one that is not, from a damaged file, would cost the
    whole answer."""
    if misfit(sample, [object]) is not None or len(sample) != 2 or not isinstance(sample[0], list):
        return False
    labels = [*snapshot["labels"], *sample[0]]
    if len(labels) != len(metric.label_names) or not all(map(_is_label, labels)):
        return False
    if metric.kind != catalog.HISTOGRAM:
        return misfit(sample[1], float) is None
    good = (
        isinstance(sample[1], list)
        and len(sample[1]) == 2
        and misfit(sample[1][0], [AtLeast(int, 0)]) is None
    )
    return (
        good
        and misfit(sample[1][1], float) is None
        and len(sample[1][0]) == len(metric.buckets) + 1
    )


def _is_label(value: Any) -> bool:
    """Whether a label can be written: half of a surrogate pair, which JSON's escapes may hold, is
    no UTF-8."""
    return misfit(value, (str, int)) is None and surrogate(str(value)) is None


def _cumulative(
    bounds: tuple[float, ...], counts: list[int], total: float
) -> tuple[list[tuple[str, int]], float]:
    """Prometheus counts all that is at or below each bound."""
    running, buckets = 0, []
    for bound, count in zip((*bounds, math.inf), counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == math.inf else str(bound), running))
    return buckets, total


def read(wait: bool = True) -> str:
    """This process's engines' metrics in Prometheus's text format, as /metrics gives them; empty
    where there is no drafter of ours.

    Args:
        wait: until engines in other processes have written what they counted before this call, a
            little over a second.
    """
    if wait:
        time.sleep(1.2 * recorder.PERIOD)
    registry = CollectorRegistry()
    registry.register(DFlashCollector())
    return generate_latest(registry).decode()

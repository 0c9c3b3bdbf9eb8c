"""Reads a trace of torch's profiler: which part of a step launched each kernel, and how long the
device was idle. Pure.

A kernel has the correlation id of the call that launched it; kernels of a CUDA graph that of the
graph's launch. The call lies, on the host's clock, in one of the ranges that ``child`` put around
the parts of a step; the narrowest counts.

    pytest tests/unit/test_gpu_programs.py
"""

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANGES = ("schedule", "execute_model", "sample_tokens", "propose", "update_from_output")
OUTSIDE = "outside"
_STEP = "step"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_SHOWN, _NAME_LENGTH = 12, 90


@dataclass(frozen=True)
class Kernel:
    """One piece of work of the device; times in microseconds of the trace's clock."""

    name: str
    began: float
    ended: float
    part: str


@dataclass(frozen=True)
class Trace:
    """What was traced."""

    kernels: Sequence[Kernel]
    launches: Mapping[str, int]
    """Calls that launched kernels, one at a time, by part."""
    graphs: Mapping[str, int]
    """Calls that launched a whole CUDA graph, by part."""
    host: Mapping[str, float]
    """The host's microseconds within each part; those of a part within it are in both."""
    wall: float
    """From the first step's begin to the last one's end."""


def read(path: Path) -> Trace:
    """A trace as ``export_chrome_trace`` writes it."""
    return parse(json.loads(path.read_text())["traceEvents"])


def parse(events: Iterable[Mapping[str, Any]]) -> Trace:
    """A trace's events; those of other kinds are passed over."""
    ranges: list[tuple[float, float, str]] = []
    steps: list[tuple[float, float]] = []
    calls: list[tuple[float, str, int]] = []
    work: list[tuple[str, float, float, int]] = []
    host: Counter[str] = Counter()
    for event in events:
        kind, began = event.get("cat"), event.get("ts")
        if event.get("ph") != "X" or began is None:
            continue
        name, took, args = event["name"], event["dur"], event.get("args", {})
        if kind == "user_annotation" and name in RANGES:
            ranges.append((began, began + took, name))
            host[name] += took
        elif kind == "user_annotation" and name == _STEP:
            steps.append((began, began + took))
        elif kind in _LAUNCHES and "correlation" in args:
            calls.append((began, name, args["correlation"]))
        elif kind in _ON_DEVICE:
            work.append((name, began, began + took, args.get("correlation", -1)))
    find = _finder(ranges)
    part_of: dict[int, str] = {}
    launches: Counter[str] = Counter()
    graphs: Counter[str] = Counter()
    for began, name, correlation in calls:
        part = find(began)
        part_of[correlation] = part
        if "GraphLaunch" in name:
            graphs[part] += 1
        elif "Launch" in name:
            launches[part] += 1
    wall = max(e for _, e in steps) - min(b for b, _ in steps) if steps else 0.0
    kernels = [
        Kernel(name, began, ended, part_of.get(correlation, OUTSIDE))
        for name, began, ended, correlation in sorted(work, key=lambda item: item[1])
    ]
    return Trace(kernels, launches, graphs, host, wall)


def summary(trace: Trace, steps: int) -> dict[str, Any]:
    """The figures of a trace of ``steps`` steps, a step: microseconds and counts."""
    by_part: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in trace.kernels:
        by_part[kernel.part].append(kernel)
    busy = _covered((k.began, k.ended) for k in trace.kernels)
    return {
        "profiled_step_us": trace.wall / steps,
        "busy_us": busy / steps,
        "idle_us": max(0.0, trace.wall - busy) / steps,
        "kernels": len(trace.kernels) / steps,
        "parts": {
            part: {
                "host_us": trace.host.get(part, 0.0) / steps,
                "device_us": _covered((k.began, k.ended) for k in by_part[part]) / steps,
                "kernels": len(by_part[part]) / steps,
                "launches": trace.launches.get(part, 0) / steps,
                "graphs": trace.graphs.get(part, 0) / steps,
                "longest": _longest(by_part[part], steps),
            }
            for part in (*RANGES, OUTSIDE)
        },
    }


def _longest(kernels: Sequence[Kernel], steps: int) -> list[dict[str, Any]]:
    took: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for kernel in kernels:
        name = kernel.name[:_NAME_LENGTH]
        took[name] += kernel.ended - kernel.began
        count[name] += 1
    return [
        {"kernel": name, "us": us / steps, "count": count[name] / steps}
        for name, us in took.most_common(_SHOWN)
    ]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of a union of spans."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        if ended > reached:
            total += ended - max(began, reached)
            reached = ended
    return total


def _finder(ranges: list[tuple[float, float, str]]) -> Any:
    """What says in which range a moment lies: of those that hold it, the one that began last."""
    ordered = sorted(ranges)
    begins = [began for began, _, _ in ordered]

    def find(moment: float) -> str:
        at = bisect.bisect_right(begins, moment)
        for _, ended, name in reversed(ordered[max(0, at - len(RANGES)) : at]):
            if moment <= ended:
                return name
        return OUTSIDE

    return find

"""Whether acceptance on a running server has fallen against what its drafter was proved at: from
/metrics of now and of the last look. Pure.

Lengths of a verification are counted by a histogram, whose buckets give their variance: a bucket's
lengths are taken for its upper bound, so the interval is a little wide.

    pytest tests/unit/test_follow_watch.py
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vllm_dflash.metrics.catalog import BY_NAME
from vllm_dflash.metrics.figures import Scrape
from vllm_dflash.records import AtLeast, Optional

_P = "vllm_dflash_"
_Z = 1.96
_LEAST = 100
"""Verifications, below which nothing is judged."""
SHAPE = {
    "seconds": AtLeast(float, 0),
    "id": str,
    "counts": {},
    "below_since": Optional((AtLeast(float, 0), None)),
}
"""Of the record that a look leaves for the next."""


@dataclass(frozen=True)
class Counted:
    """Counts of a server, over all its engines, since it began."""

    drafter: str
    id: str
    """Of the drafter that serves; several, joined by a comma, where engines differ."""
    proved: float | None
    swaps: float
    buckets: Mapping[str, float]
    """Verifications by the upper bound of their length, each with those below it."""
    total: float
    """Tokens that verifications committed."""
    by_context: Mapping[str, tuple[float, float]]
    """Verifications and tokens by the request's context length."""

    @classmethod
    def of(cls, scrape: Scrape) -> "Counted":
        buckets: dict[str, float] = defaultdict(float)
        context: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        total, swaps, proved, names, ids = 0.0, 0.0, [], set(), set()
        for (name, labels), value in scrape.samples.items():
            found = dict(labels)
            if name == f"{_P}accepted_length_bucket":
                buckets[found["le"]] += value
            elif name == f"{_P}accepted_length_sum":
                total += value
            elif name == f"{_P}context_verifications_total":
                context[found["context_length"]][0] += value
            elif name == f"{_P}context_committed_tokens_total":
                context[found["context_length"]][1] += value
            elif name == f"{_P}drafter_swaps_total" and found["result"] == "swapped":
                swaps += value
            elif name == f"{_P}drafter_serving_since_seconds":
                names.add(found["drafter"])
                ids.add(found["drafter_id"])
            elif name == f"{_P}drafter_proved_accepted_length":
                proved.append(value)
        return cls(
            ", ".join(sorted(names)),
            ", ".join(sorted(ids)),
            min(proved, default=None),
            swaps,
            dict(buckets),
            total,
            {length: (counts[0], counts[1]) for length, counts in context.items()},
        )

    def as_record(self) -> dict[str, Any]:
        """Of the counts, for the next look."""
        return {
            "buckets": dict(self.buckets),
            "total": self.total,
            "by_context": {name: list(counts) for name, counts in self.by_context.items()},
        }


@dataclass(frozen=True)
class Look:
    """What acceptance was over a time."""

    tau: float | None
    half: float
    """Half of tau's 95 % interval."""
    verifications: float
    since: float | None
    """Unix time; None: since the server began."""
    by_context: Mapping[str, float]
    proved: float | None

    def is_below(self, limit: float) -> bool:
        """Whether tau is below, by more than its interval."""
        return (
            self.tau is not None and self.verifications >= _LEAST and self.tau + self.half < limit
        )

    def __str__(self) -> str:
        since = "the server began" if self.since is None else _time(self.since)
        if self.tau is None:
            return f"no draft was verified since {since}"
        by = ", ".join(f"{name}: {value:.2f}" for name, value in self.by_context.items())
        said = f"tau {self.tau:.2f} +- {self.half:.2f} over {self.verifications:,.0f} verifications"
        said += f" since {since}" + (f" (by context length {by})" if by else "")
        if self.proved is not None:
            said += f", proved at {self.proved:.2f}: {self.tau / self.proved:.0%} of it"
        return said


def look(now: Counted, before: Mapping[str, Any] | None) -> Look | None:
    """Over the time since the last look's record, or since the server began; None where another
    drafter came meanwhile, so that nothing can be told apart."""
    if before is not None and (before["id"] != now.id or _began_anew(now, before["counts"])):
        before = None
    if before is None and now.swaps:
        return None
    past: Mapping[str, Any] = before["counts"] if before is not None else {}
    since = before["seconds"] if before is not None else None
    buckets = {
        name: count - past.get("buckets", {}).get(name, 0.0) for name, count in now.buckets.items()
    }
    total = now.total - past.get("total", 0.0)
    contexts = {}
    for name, (count, tokens) in sorted(now.by_context.items(), key=lambda item: _first(item[0])):
        earlier = past.get("by_context", {}).get(name, (0.0, 0.0))
        if count > earlier[0]:
            contexts[name] = (tokens - earlier[1]) / (count - earlier[0])
    count = max(buckets.values(), default=0.0)
    if not count:
        return Look(None, math.inf, 0.0, since, {}, now.proved)
    mean = total / count
    variance = max(_second_moment(buckets) / count - mean**2, 0.0)
    half = _Z * math.sqrt(variance / count)
    return Look(mean, half, count, since, contexts, now.proved)


def threshold(when_below: float, proved: float | None) -> float | None:
    """tau that acceptance must not be below: ``when_below`` itself above 1, else this share of what
    the drafter was proved at; None where that is not known."""
    if when_below > 1:
        return when_below
    return None if proved is None else when_below * proved


def _began_anew(now: Counted, counts: Mapping[str, Any]) -> bool:
    """Whether the server began after these counts: one that fell is another server's."""
    past = counts.get("buckets", {})
    return any(now.buckets.get(name, 0.0) < count for name, count in past.items())


def _second_moment(cumulative: Mapping[str, float]) -> float:
    """Sum of squares of the lengths, by each bucket's upper bound."""
    longest = BY_NAME["accepted_length"].buckets[-1]
    found, below = 0.0, 0.0
    for bound, count in sorted((min(float(le), longest), n) for le, n in cumulative.items()):
        found += bound**2 * max(count - below, 0.0)
        below = max(count, below)
    return found


def _first(bucket: str) -> int:
    digits = bucket.partition("-")[0].rstrip("+")
    return int(digits) if digits.isdecimal() else 0


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="minutes")

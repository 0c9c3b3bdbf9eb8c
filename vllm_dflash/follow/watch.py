"""Whether acceptance on a running server has fallen against what its drafter was proved at: from
/metrics of now and of the last look, with the figures of ``vllm-dflash top``. Pure.

    pytest tests/unit/test_follow_watch.py
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vllm_dflash.metrics.figures import Scrape, figures, tau_variance
from vllm_dflash.records import AtLeast, Optional

_P = "vllm_dflash_"
_COUNTS = ("accepted_length_", "context_", "prompt_class_")
_Z = 1.96
_LEAST = 100
"""Verifications, below which nothing is judged."""
SHAPE = {
    "seconds": AtLeast(float, 0),
    "id": str,
    "samples": [{"name": str, "labels": {}, "value": AtLeast(float, 0)}],
    "below_since": Optional((AtLeast(float, 0), None)),
}
"""Of the record that a look leaves for the next."""


@dataclass(frozen=True)
class Serving:
    """What a server says of its drafter, over all its engines."""

    drafters: tuple[str, ...]
    """Folders or hub ids; several where engines differ."""
    id: str
    proved: float | None
    swaps: float

    @classmethod
    def of(cls, scrape: Scrape) -> "Serving":
        def of(name: str) -> list[tuple[dict[str, str], float]]:
            items = scrape.samples.items()
            return [(dict(labels), value) for (n, labels), value in items if n == _P + name]

        serving = [labels for labels, _ in of("drafter_serving_since_seconds")]
        swaps = [n for labels, n in of("drafter_swaps_total") if labels["result"] == "swapped"]
        return cls(
            tuple(sorted({labels["drafter"] for labels in serving})),
            ", ".join(sorted({labels["drafter_id"] for labels in serving})),
            min((tau for _, tau in of("drafter_proved_accepted_length")), default=None),
            sum(swaps),
        )


@dataclass(frozen=True)
class Look:
    """What acceptance was over a time."""

    tau: float | None
    half: float
    """Half of tau's 95 % interval, at most."""
    verifications: float
    since: float | None
    """Unix time; None: since the server began."""
    by_context: Mapping[str, float]
    by_class: Mapping[str, float]
    """Of prompts, as requests name it."""
    proved: float | None

    def is_below(self, limit: float) -> bool:
        """Whether tau is below, by more than its interval."""
        return (
            self.tau is not None and self.verifications >= _LEAST and self.tau + self.half < limit
        )

    def __str__(self) -> str:
        since = "the server began" if self.since is None else utc(self.since)
        if self.tau is None:
            return f"no draft was verified since {since}"
        by = "; ".join(
            f"by {what} " + ", ".join(f"{name}: {value:.2f}" for name, value in taus.items())
            for what, taus in (("context length", self.by_context), ("class", self.by_class))
            if taus
        )
        said = f"tau {self.tau:.2f} +- {self.half:.2f} over {self.verifications:,.0f} verifications"
        said += f" since {since}" + (f" ({by})" if by else "")
        if self.proved is not None:
            said += f", proved at {self.proved:.2f}: {self.tau / self.proved:.0%} of it"
        return said


def record_of(now: Scrape, seconds: float) -> dict[str, Any]:
    """For the next look: the counts of this one, taken at a Unix time."""
    samples = [
        {"name": name, "labels": dict(labels), "value": value}
        for (name, labels), value in now.samples.items()
        if name.startswith(tuple(_P + each for each in _COUNTS))
    ]
    return {"seconds": seconds, "id": Serving.of(now).id, "samples": samples}


def look(now: Scrape, before: Mapping[str, Any] | None) -> Look | None:
    """Over the time since the last look's record, or since the server began; None where another
    drafter came meanwhile, so that nothing can be told apart."""
    serving, earlier = Serving.of(now), None
    if before is not None and before["id"] == serving.id:
        samples = {
            (each["name"], frozenset(each["labels"].items())): each["value"]
            for each in before["samples"]
        }
        # A count that fell is of a server that began after the last look.
        if all(now.samples.get(key, 0.0) >= value for key, value in samples.items()):
            earlier = Scrape(before["seconds"], samples)
    if earlier is None and serving.swaps:
        return None
    engines = [found for found in figures(now, earlier) if found["verifications"]]
    count = sum(found["verifications"] for found in engines)
    since = None if earlier is None else earlier.seconds
    if not count:
        return Look(None, math.inf, 0.0, since, {}, {}, serving.proved)
    tau = sum(found["tau"] * found["verifications"] for found in engines) / count
    variance = max(tau_variance(tau, found["block_size"]) for found in engines)
    one = engines[0] if len(engines) == 1 else {}
    by_context = one.get("tau_by_context", {})
    ordered = dict(sorted(by_context.items(), key=lambda item: _first(item[0])))
    by_class = dict(sorted(one.get("tau_by_class", {}).items()))
    half = _Z * math.sqrt(variance / count)
    return Look(tau, half, count, since, ordered, by_class, serving.proved)


def threshold(when_below: float, proved: float | None) -> float | None:
    """tau that acceptance must not be below: ``when_below`` itself above 1, else this share of what
    the drafter was proved at; None where that is not known."""
    if when_below > 1:
        return when_below
    return None if proved is None else when_below * proved


def _first(bucket: str) -> int:
    digits = bucket.partition("-")[0].rstrip("+")
    return int(digits) if digits.isdecimal() else 0


def utc(seconds: float) -> str:
    """A Unix time as text, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="minutes")

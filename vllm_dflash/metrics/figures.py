"""What an operator wants to know, out of /metrics: over the time between two answers, or since the
server began. Pure.

pytest tests/unit/test_metrics.py
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "vllm_dflash_"
_ALIKE = 1.1
"""A confidence interval whose ends are no further apart, and that has 1 in it, says that drafts
make no difference."""
_Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """One answer of /metrics, at a time in seconds."""

    seconds: float
    samples: dict[tuple[str, _Labels], float]

    @classmethod
    def parse(cls, text: str, seconds: float) -> "Scrape":
        families = text_string_to_metric_families(text)
        return cls(
            seconds,
            {
                (s.name, frozenset(s.labels.items())): s.value
                for family in families
                for s in family.samples
            },
        )

    def engines(self) -> list[tuple[str, str]]:
        """(model, engine) of every engine with one of our drafters."""
        found = {
            (dict(labels)["model_name"], dict(labels)["engine"])
            for name, labels in self.samples
            if name == f"{_PREFIX}drafter_info"
        }
        return sorted(found)


class _Engine:
    """The samples of one engine, as growth since an earlier answer."""

    def __init__(self, now: Scrape, before: Scrape | None, model: str, engine: str) -> None:
        self.own = {("model_name", model), ("engine", engine)}
        self._now, self._before = now.samples, before.samples if before else {}

    def each(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """The further labels of each sample of a counter, and its growth."""
        for (found, labels), value in self._now.items():
            if found == name and labels >= self.own:
                earlier = self._before.get((found, labels), 0.0)
                # A count that fell is of an engine that has begun anew.
                yield dict(labels - self.own), value - earlier if value >= earlier else value

    def total(self, name: str) -> float:
        return sum(value for _, value in self.each(name))

    def by(self, label: str, name: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for labels, value in self.each(name):
            found[labels[label]] += value
        return dict(found)

    def value(self, name: str) -> tuple[dict[str, str], float] | None:
        """A gauge's further labels and its value."""
        return next(
            (
                (dict(ls - self.own), v)
                for (found, ls), v in self._now.items()
                if found == name and ls >= self.own
            ),
            None,
        )


def figures(now: Scrape, before: Scrape | None = None) -> list[dict[str, Any]]:
    """By engine, the figures of the time since ``before``, or since the server began; None stands
    for what cannot be known."""
    return [_figures(now, before, model, engine) for model, engine in now.engines()]


def _taus(see: _Engine, label: str, what: str) -> dict[str, float]:
    """tau by the values of a label, of those that were verified."""
    counts = see.by(label, f"{_PREFIX}{what}_verifications_total")
    committed = see.by(label, f"{_PREFIX}{what}_committed_tokens_total")
    return {value: committed[value] / count for value, count in counts.items() if count}


def _figures(now: Scrape, before: Scrape | None, model: str, engine: str) -> dict[str, Any]:
    see = _Engine(now, before, model, engine)
    speedup, info = see.value(f"{_PREFIX}estimated_speedup"), see.value(f"{_PREFIX}drafter_info")
    lengths = see.total(f"{_PREFIX}accepted_length_count")
    steps, step_seconds = (
        see.by("kind", f"{_PREFIX}step_seconds_count"),
        see.by("kind", f"{_PREFIX}step_seconds_sum"),
    )
    output = see.by("step", f"{_PREFIX}output_tokens_total")
    verified, reached, accepted = (
        see.by("position", f"{_PREFIX}{what}_tokens_total")
        for what in ("verified", "reached", "accepted")
    )
    positions = see.by("state", f"{_PREFIX}draft_context_positions_total")
    controller: dict[str, float] = {}
    for labels, count in see.each(f"{_PREFIX}controller_steps_total"):
        controller[f"{labels['choice']} ({labels['why']})"] = count
    return {
        "model": model,
        "engine": engine,
        "drafter": info[0] if info else {},
        "seconds": now.seconds - before.seconds if before else None,
        "speedup": _over(
            see.total(f"{_PREFIX}baseline_seconds_total"),
            see.total(f"{_PREFIX}measured_seconds_total"),
        ),
        "baseline": speedup[0]["baseline"] if speedup else None,
        "drafting": _drafting(see),
        "steps": steps.get("speculative", 0.0) + steps.get("partial", 0.0),
        "block_size": float(info[0].get("block_size", 0)) if info else 0.0,
        "tau": _over(see.total(f"{_PREFIX}accepted_length_sum"), lengths),
        "verifications": lengths,
        "request_tau": _over(
            see.total(f"{_PREFIX}request_accepted_length_sum"),
            see.total(f"{_PREFIX}request_accepted_length_count"),
        ),
        "draft_length": _over(
            see.total(f"{_PREFIX}draft_length_sum"), see.total(f"{_PREFIX}draft_length_count")
        ),
        "acceptance": {
            at: _over(accepted.get(at, 0.0), reached[at]) for at in sorted(reached, key=int)
        },
        "verified": {at: verified[at] for at in sorted(verified, key=int)},
        "drafter_share": _over(
            see.total(f"{_PREFIX}drafter_seconds_sum"), sum(step_seconds.values())
        ),
        "step_ms": {
            kind: 1000 * step_seconds[kind] / count for kind, count in steps.items() if count
        },
        "time_share": {
            kind: seconds / sum(step_seconds.values())
            for kind, seconds in step_seconds.items()
            if seconds
        },
        "output_tokens": output,
        "tokens_per_second": (
            _over(sum(output.values()), now.seconds - before.seconds) if before else None
        ),
        "tau_by_context": _taus(see, "context_length", "context"),
        "tau_by_class": _taus(see, "prompt_class", "prompt_class"),
        "missing_context": _over(positions.get("missing", 0.0), sum(positions.values())),
        "controller": controller,
        "refused": see.by("reason", f"{_PREFIX}speculation_refused_total"),
        "running": (see.value("vllm:num_requests_running") or ({}, None))[1],
        "waiting": (see.value("vllm:num_requests_waiting") or ({}, None))[1],
    }


def _drafting(see: _Engine) -> dict[str, Any] | None:
    """What the controller makes of drafting; None without one."""
    state = see.value(f"{_PREFIX}drafting")
    if state is None:
        return None
    age, trial = (
        see.value(f"{_PREFIX}draft_measured_age_seconds"),
        see.value(f"{_PREFIX}next_trial_seconds"),
    )
    return {
        "on": state[1] > 0,
        "why": state[0]["why"],
        "measured_seconds_ago": age[1] if age else None,
        "next_trial_seconds": trial[1] if trial else None,
    }


_WHY = {
    "first": "nothing was chosen yet",
    "pays": "measured to pay",
    "slow": "measured slow",
    "rejected": "too few draft tokens are accepted",
}


def drafting_line(found: dict[str, Any]) -> str:
    """Whether drafting is on, why, how old that is and when it is tried again."""
    state = found["drafting"]
    if state is None:
        return "always on: without adaptive drafting"
    line = f"{'on' if state['on'] else 'off'}: {_WHY.get(state['why'], state['why'])}"
    if state["measured_seconds_ago"] is not None:
        line += f", {_duration(state['measured_seconds_ago'])} ago"
    if state["next_trial_seconds"] is not None:
        line += f", next trial in {_duration(state['next_trial_seconds'])} of decoding"
    return line


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


def interval(found: dict[str, Any]) -> tuple[float, float] | None:
    """The speed-up's 95 % confidence interval, by the least that can be said for so many
    speculative steps; None without any.

    A step's time is taken to have as large a deviation as its mean, as on a machine that others
    use.
    """
    speedup, tau, steps = (
        found["speedup"],
        found["tau"],
        min(found["steps"], found["verifications"]),
    )
    if speedup is None or tau is None or not steps:
        return None
    variance = tau_variance(tau, found["block_size"]) / tau**2 + 1.0
    factor = math.exp(min(1.96 * math.sqrt(variance / steps), 99.0))
    return speedup / factor, speedup * factor


def tau_variance(tau: float, block_size: float) -> float:
    """The most that accepted lengths between 1 and the block's size with mean ``tau`` can vary
    (Bhatia and Davis)."""
    return max((tau - 1) * (block_size - tau), 0.0)


def _over(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def verdict(found: dict[str, Any]) -> str:
    """Whether it pays, in a line."""
    speedup, tau = found["speedup"], found["tau"]
    if not found["verifications"]:
        return "no draft was verified in this time"
    if speedup is None:
        return (
            f"tau {tau:.2f}; whether it pays cannot be said without a baseline: turn adaptive"
            " drafting on, or run vllm-dflash bench"
        )
    within = interval(found)
    count = f"{found['verifications']:.0f} verifications in {found['steps']:.0f} steps"
    if within is None:
        return f"no verdict yet: {count}"
    low, high = within
    if low < 1 < high and high / low > _ALIKE:
        return f"no verdict yet: between {low:.2f} and {high:.2f} x plain decoding by {count}"
    word = "pays" if low >= 1 else "does not pay" if high <= 1 else "makes no difference"
    return (
        f"{word}: {speedup:.2f} x plain decoding ({found['baseline']}; {low:.2f} to {high:.2f} by"
        f" {count}), tau {tau:.2f}"
    )

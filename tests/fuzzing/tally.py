"""What a run of the fuzzer has seen."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What a run has seen."""

    requests: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    """Requests by what they ask for."""
    outcomes: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    ties: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    """What ended the engine without a drafter too: vLLM's own."""
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        drafts, accepted = (
            self.counters[f"spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens")
        )
        lines = [
            f"{self.requests} requests: "
            + ", ".join(f"{n} {what}" for what, n in sorted(self.outcomes.items())),
            "engines: " + ", ".join(f"{n} {what}" for what, n in sorted(self.engines.items())),
            "fields: " + ", ".join(f"{n} {what}" for what, n in sorted(self.fields.items())),
            (
                f"{self.counters['num_preemptions']:.0f} preemptions,"
                f" {self.counters['prefix_cache_hits']:.0f} prompt tokens from the prefix cache,"
                f" {drafts:.0f} drafts, tau {1 + accepted / max(drafts, 1):.2f}"
            ),
            *self.ties,
            *self.deaths,
            (
                f"{len(self.ties)} ties, {len(self.differences)} differences,"
                f" {len(self.deaths)} deaths of both engines"
            ),
        ]
        return "\n".join(lines)

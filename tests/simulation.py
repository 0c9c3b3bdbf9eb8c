"""A server in numbers: steps of known cost and requests of known acceptance, to hold the controller against what is best in hindsight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.cost import Work


@dataclass
class Server:
    """``cost`` gives the seconds of a step; a request's draft tokens are accepted with its ``rates``, one after the other."""

    cost: Callable[[Work], float]
    max_draft: int = 7
    noise: float = 0.0
    """Standard deviation of the logarithm of a measured time."""
    held_up: float = 0.0
    """Probability that another process holds a step up, by a factor of four."""
    seed: int = 0
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def run(
        self, plan: Callable[[list[str]], Plan], batches: Sequence[dict[str, Sequence[float]]], observe: Callable[..., None] | None = None
    ) -> tuple[float, float]:
        """One step a batch (request to rates); returns committed tokens and true seconds."""
        committed = seconds = 0.0
        waiting: dict[str, int] = {}
        for batch in batches:
            outcomes = {}
            for request, rates in batch.items():
                verified, accepted = waiting.get(request, 0), 0
                while accepted < verified and self.random.random() < rates[accepted]:
                    accepted += 1
                outcomes[request] = (verified, accepted)
                committed += accepted + 1
            now = plan(list(batch))
            verified = sum(verified for verified, _ in outcomes.values())
            k = now.num_draft_tokens
            work = Work(len(batch), len(batch) + verified, len(batch) * (k + 1) if k else 0)
            true = self.cost(work)
            seconds += true
            waiting = dict(now.lengths)
            if observe is not None:
                measured = true * np.exp(self.noise * self.random.standard_normal()) * (4 if self.random.random() < self.held_up else 1)
                observe(work, measured, outcomes)
        return committed, seconds

    def fixed(self, k: int, batches: Sequence[dict[str, Sequence[float]]]) -> float:
        """Tokens a second of a fixed K."""
        tokens, seconds = self.run(lambda requests: Plan(k, dict.fromkeys(requests, k)), batches)
        return tokens / seconds

    def adaptive(self, batches: Sequence[dict[str, Sequence[float]]], controller: Controller | None = None) -> float:
        """Tokens a second under a controller."""
        controller = controller or Controller(self.max_draft)
        tokens, seconds = self.run(controller.plan, batches, controller.observe)
        return tokens / seconds


def two_cores(work: Work) -> float:
    """Seconds on two cores, of the embedded pair's kind: every row costs."""
    return 1e-3 * (5.0 + 0.55 * work.num_tokens + (1.8 if work.draft_rows else 0) + 0.12 * work.draft_rows)


def large_gpu(work: Work) -> float:
    """Seconds of an 8B target on a large GPU: flat up to 180 rows, then as many as there are."""
    return 1e-3 * (4.2 * max(1.0, work.num_tokens / 180) + (0.8 + 0.001 * work.draft_rows if work.draft_rows else 0))

"""A large GPU with asynchronous scheduling, in numbers: an H200's roofline for an 8B target.

A step is planned, and its drafts' lengths are chosen, before the outcome of the one before it is
known; drafts stay on the device, so there are no confidences. A step's output is handed on before
its draft runs, so the time between two outputs holds the draft of the step before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulation import profile_of
from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.tuning import TUNING, Tuning
from vllm_dflash.cost_profile import Profile
from vllm_dflash.steps import Work


def h200(work: Work) -> float:
    """Seconds on an H200, of Qwen3-8B's shape in bfloat16 with a drafter of five layers: weights of
    16.4 GB at 4.3 TB/s, 16.4 GFLOP a row at 790 TFLOP/s; 147 kB of keys and values a position, 590
    kFLOP a row and position at half the rate. The drafter's the same by its layers and lm_head."""
    target = max(3.8e-3, 0.0208e-3 * work.num_tokens) + 0.1e-3
    attention = max(34e-9 * work.num_context, 1.5e-9 * work.attended)
    if not work.draft_rows:
        return target + attention
    draft = max(0.75e-3, 0.0041e-3 * work.draft_rows) + 0.15e-3
    return target + attention + draft + 0.5e-9 * work.draft_attended


@dataclass
class AsyncServer:
    """``num_reqs`` requests whose draft tokens are each accepted with probability ``rate``, once
    all before are, at ``context`` positions each."""

    num_reqs: int
    rate: float
    context: int
    block: int = 16
    noise: float = 0.02
    cost: Callable[[Work], float] = h200
    seed: int = 0
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def fixed(self, k: int) -> float:
        """Tokens a second of a fixed K, in the long run; 0: plain decoding."""
        seconds = self.cost(self._work([k] * self.num_reqs, drafts=k > 0))
        tokens = 1 + sum(self.rate**i for i in range(1, k + 1))
        return self.num_reqs * tokens / seconds

    def adaptive_verification(self, profiled: int = 8192, max_num_reqs: int = 256) -> float:
        """Tokens a second of vLLM's adaptive verification, in the long run, with confidences that
        are right: it drafts in every step, and verifies as many tokens as commit the most a second
        by its own tables, which are measured at contexts of ``profiled`` positions."""

        def verify(tokens: int) -> float:
            requests = min(tokens, max_num_reqs)
            return self.cost(Work(requests, tokens, 0, requests * profiled, tokens * profiled))

        count, rows = self.num_reqs, self.num_reqs * self.block
        target = Work(count, count, 0, count * profiled, count * profiled)
        whole = target._replace(draft_rows=rows, draft_attended=rows * profiled)
        draft = self.cost(whole) - self.cost(target)
        survival = np.repeat(self.rate ** np.arange(1, self.block), count)
        tokens = count + np.concatenate([[0.0], survival.cumsum()])
        seconds = draft + np.array([verify(count + budget) for budget in range(len(tokens))])
        budget = int((tokens / seconds).argmax())
        each, more = divmod(budget, count)
        work = self._work([each + (i < more) for i in range(count)], drafts=True)
        return float(tokens[budget]) / self.cost(work)

    def profile(self) -> Profile:
        """As it is measured at warm-up."""
        contexts = [self.context // 8, self.context]
        return profile_of(self.cost, self.block - 1, 256, contexts, self.noise)

    def adaptive(
        self, steps: int, profile: Profile | None = None, tuning: Tuning = TUNING
    ) -> float:
        """Tokens a second of the controller, from the first step on. Counted are those to be
        expected of what it verifies: the luck of its requests is not its doing."""
        requests = [f"r{i}" for i in range(self.num_reqs)]
        controller = Controller(
            self.block - 1,
            self.block,
            context=lambda _: self.context,
            profile=profile or self.profile(),
            tuning=tuning,
            skips=False,
        )
        expected = (self.rate ** np.arange(self.block)).cumsum()  # of a request, by K
        tokens = seconds = 0.0
        before = Plan(0)
        verified = dict.fromkeys(requests, 0)
        waiting: tuple[Work, float, dict[str, tuple[int, int]], Plan] | None = None
        for _ in range(steps):
            plan = controller.plan(requests)
            scheduled, verified = verified, controller.lengths(requests, plan)
            if waiting is not None:  # the outcome of the step before is known only now
                work, took, outcomes, theirs = waiting
                drafted = {name: counts for name, counts in outcomes.items() if counts[0]}
                controller.observe(work, took, drafted, None, theirs)
            counts = list(scheduled.values())
            accepted = np.minimum(self.random.geometric(1 - self.rate, len(counts)) - 1, counts)
            work = self._work(counts, drafts=before.num_draft_tokens > 0)
            true = self.cost(work)
            took = true * float(np.exp(self.noise * self.random.standard_normal()))
            outcomes = dict(zip(requests, zip(counts, accepted.tolist(), strict=True), strict=True))
            waiting, before = (work, took, outcomes, plan), plan
            tokens += float(expected[counts].sum())
            seconds += true
        return tokens / seconds

    def _work(self, verified: Sequence[int], drafts: bool) -> Work:
        count, rows = len(verified), len(verified) + sum(verified)
        block = self.block if drafts else 0
        return Work(
            count,
            rows,
            count * block,
            count * self.context,
            rows * self.context,
            count * block * self.context,
        )

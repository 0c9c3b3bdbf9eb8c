"""What may be drafted and verified in a step, and what that is expected to cost and bring. Pure.

Verifying some of a draft's tokens commits one token a request, and each draft token with the
probability that it and all before it are accepted. ``StepCost`` knows the seconds, ``Acceptance``
the probabilities.

    pytest tests/unit/test_adaptive.py
"""

from dataclasses import dataclass

import numpy as np

from vllm_dflash.adaptive.cost import LocalCost, Work


@dataclass(frozen=True)
class Plan:
    """What to draft in a step, and which of it to verify in the next."""

    num_draft_tokens: int
    """K of the step: all, or 0 for no drafter forward."""
    threshold: float = 0.0
    """A draft token is worth verifying if it is accepted with a probability above."""
    why: str = "best"
    """``best`` by what is known, ``first`` steps of a batch size, or ``trial`` of what does not
    look best."""


@dataclass(frozen=True)
class Choice:
    """The plan of the next steps, for so many requests, with the committed tokens a second that are
    expected of it."""

    plan: Plan
    num_reqs: int
    rate: float


@dataclass(frozen=True)
class Outlook:
    """What is expected of plans for ``num_reqs`` requests, by what is known now."""

    cost: LocalCost
    survival: np.ndarray
    """float64 [n, K] of whole drafts as they are to be expected: see ``Acceptance.expected``."""
    num_reqs: int
    num_context: int
    """Positions of the requests' contexts, in all."""
    block_size: int
    """The drafter's rows of one request."""

    def weigh(self, k: int) -> Choice:
        """Steps that draft ``k`` tokens a request and verify the likeliest of them, as many as
        commit the most tokens a second.

        ``survival`` falls along a row, so the tokens above a threshold are each request's first
        ones. Half a token more a request at a time, for the cost need not be a line: a GPU has a
        number of rows from which on each costs.
        """
        survival, num_reqs = self.survival, self.num_reqs
        likeliest, share = np.sort(survival[:, :k], axis=None)[::-1], num_reqs / len(survival)
        gained, best = [0.0, *likeliest.cumsum().tolist()], None
        thresholds = np.append(likeliest, 0.0)[
            [min(round(half / 2 * len(survival)), len(likeliest)) for half in range(2 * k + 1)]
        ].tolist()
        counts = np.searchsorted(
            -likeliest, [-threshold for threshold in thresholds]
        ).tolist()  # of equal ones all stay out
        for threshold, count in zip(thresholds, counts, strict=True):
            seconds = self.cost.seconds(self._work(round(count * share), k))
            rate = (num_reqs + gained[count] * share) / seconds
            if best is None or rate > best.rate:
                best = Choice(Plan(k, threshold), num_reqs, rate)
        assert best is not None
        return best

    def expected(self, plan: Plan) -> tuple[Work, float]:
        """A step of a plan, and the tokens that it is expected to commit."""
        likely = self.survival[:, : plan.num_draft_tokens]
        share, kept = self.num_reqs / len(self.survival), likely[likely > plan.threshold]
        work = self._work(round(len(kept) * share), plan.num_draft_tokens)
        return work, self.num_reqs + float(kept.sum()) * share

    def credible(self, work: Work) -> float:
        """Seconds of a step, at most those of as many plain steps as it has rows for each request:
        the drafter is no larger than the target."""
        plain = self.cost.seconds(Work(work.num_reqs, work.num_reqs, 0, work.num_context))
        most = plain * (work.num_tokens + work.draft_rows) / work.num_reqs
        return min(self.cost.seconds(work), most)

    def loss(self, best: Choice, plan: Plan) -> float:
        """Seconds that a step of ``plan`` is expected to lose against ``best``."""
        work, tokens = self.expected(plan)
        best_work, best_tokens = self.expected(best.plan)
        seconds = self.credible(work)
        # What computes less in every way takes no longer, whatever was measured.
        if work.num_tokens <= best_work.num_tokens and work.draft_rows <= best_work.draft_rows:
            seconds = min(seconds, best_tokens / best.rate)
        return max(seconds - tokens / best.rate, 0.0)

    def most_rate(self, max_draft: int) -> float:
        """Committed tokens a second if whole drafts of so many tokens were accepted, of requests
        without context."""
        verified, draft_rows = self.num_reqs * max_draft, self.num_reqs * self.block_size
        seconds = self.cost.seconds(Work(self.num_reqs, self.num_reqs + verified, draft_rows))
        return self.num_reqs * (max_draft + 1) / seconds

    def _work(self, num_verified: int, num_draft_tokens: int) -> Work:
        """A step that verifies so many draft tokens in all."""
        return Work(
            self.num_reqs,
            self.num_reqs + num_verified,
            self.num_reqs * self.block_size if num_draft_tokens else 0,
            self.num_context,
        )

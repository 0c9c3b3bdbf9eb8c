"""A server in numbers: steps of known cost and requests of known acceptance, to hold the controller
against what is best in hindsight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.adaptive.tuning import TUNING, Tuning
from vllm_dflash.cost_profile import Cell, Profile, fit
from vllm_dflash.steps import Work

Batch = dict[str, Sequence[float]]
"""Request to the probability with which its draft token at each position is accepted, once all
before it are."""


class _Unasked:
    """In the controller's place where K is fixed: every draft is verified whole, and nothing is
    learned."""

    def observe(
        self,
        work: Work,
        seconds: float,
        outcomes: Any,
        confidences: Any = None,
        plan: Plan | None = None,
        writes_backlog: bool = False,
    ) -> None: ...

    def lengths(
        self, requests: Sequence[str], plan: Plan, confidences: Any = None
    ) -> dict[str, int]:
        return {r: 0 if r in plan.skipped else plan.num_draft_tokens for r in requests}


def profile_of(
    cost: Callable[[Work], float],
    max_draft: int,
    most_reqs: int = 64,
    contexts: Sequence[int] = (),
    noise: float = 0.0,
    wrong: Callable[[Work, float], float] = lambda work, seconds: seconds,
) -> Profile:
    """As the warm-up would measure it on such a server; ``wrong``: what it measured in place of the
    true seconds."""
    random, block = np.random.default_rng(7), max_draft + 1
    targets = [Work(1, rows, 0) for rows in _rows(most_reqs * block)]
    drafts = [Work(n, 0, n * block) for n in _rows(most_reqs)]
    for context in contexts:
        targets += [Work(1, rows, 0, context, rows * context) for rows in (1, block)]
        drafts.append(Work(1, 0, block, context, 0, block * context))

    def measured(work: Work) -> float:
        plain = work._replace(draft_rows=0, draft_attended=0)
        seconds = cost(work) - (cost(plain) if work.draft_rows else 0.0)
        return wrong(work, seconds) * float(np.exp(noise * random.standard_normal()))

    return fit(Cell(work, measured(work)) for work in [*targets, *drafts] for _ in range(3))


def _rows(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8 ... ``most``."""
    return sorted({n for i in range(11) for n in (1 << i, 3 << i) if n < most} | {most})


@dataclass
class Server:
    """``cost`` gives the seconds of a step; a request's draft tokens are accepted with its rates,
    one after the other."""

    cost: Callable[[Work], float]
    max_draft: int = 7
    noise: float = 0.0
    """Standard deviation of the logarithm of a measured time."""
    held_up: float = 0.0
    """Probability that another process holds a step up, by a factor of four."""
    drift: float = 0.0
    """How much slower than at its best the machine may get: every some 60 steps it takes up another
    pace between. Not the drafts' doing, so throughput is of steps at its best pace."""
    making: float = 0.0
    """Seconds more of a step with a number of the target's rows that is new: its kernels are
    made."""
    catching_up: float = 0.0
    """Seconds more of a step that drafts after steps that did not, for each of their tokens: its
    context is written."""
    spread: float = 0.0
    """Standard deviation of a draft token's log-odds around its rate's."""
    confident: bool = False
    """Whether the drafter says how sure it is of a token; it thinks too well of itself."""
    seed: int = 0
    contexts: dict[str, int] = field(default_factory=dict)
    """Of requests whose contexts cost something."""
    skips: bool = False
    """Whether requests that have nothing to gain cost no rows of the drafter's."""
    random: np.random.Generator = field(init=False)
    met: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def fixed(
        self, k: int, batches: Sequence[Batch], skipped: frozenset[str] = frozenset()
    ) -> float:
        """Tokens a second of a fixed K; of requests that are skipped nothing is drafted."""
        return self._run(_Unasked(), batches, lambda requests: Plan(k, skipped=skipped))

    def adaptive(self, batches: Sequence[Batch], controller: Controller | None = None) -> float:
        """Tokens a second under a controller."""
        controller = controller or self.controller()
        return self._run(controller, batches, controller.plan)

    def controller(self, tuning: Tuning = TUNING, profile: Profile | None = None) -> Controller:
        """One that was started on this server."""
        longest = max(self.contexts.values(), default=0)
        return Controller(
            self.max_draft,
            self.max_draft + 1,
            context=lambda request: self.contexts.get(request, 0),
            profile=profile
            or profile_of(
                self.cost,
                self.max_draft,
                contexts=[longest // 8, longest] if longest else [],
                noise=self.noise,
            ),
            tuning=tuning,
            skips=self.skips,
        )

    def _run(
        self,
        controller: "Controller | _Unasked",
        batches: Sequence[Batch],
        plan: Callable[[list[str]], Plan],
    ) -> float:
        """One step a batch; returns committed tokens over true seconds."""
        committed = seconds = 0.0
        drafted: dict[str, np.ndarray] = {}
        verified: dict[str, int] = {}
        said: dict[str, list[float]] = {}
        pace, waiting = 1.0, 0
        for batch in batches:
            if self.drift and self.random.random() < 1 / 60:
                pace = 1 + self.drift * self.random.random()
            outcomes = {}
            for request in batch:
                count, accepted = verified.get(request, 0), 0
                while accepted < count and self.random.random() < drafted[request][accepted]:
                    accepted += 1
                outcomes[request] = (count, accepted)
                committed += accepted + 1
            before = waiting
            waiting += sum(accepted + 1 for _, accepted in outcomes.values())
            requests, now = list(batch), plan(list(batch))
            k, num_verified = now.num_draft_tokens, sum(count for count, _ in outcomes.values())
            drafting = [r for r in batch if k and not (self.skips and r in now.skipped)]
            context, block = self.contexts.get, self.max_draft + 1
            work = Work(
                len(batch),
                len(batch) + num_verified,
                block * len(drafting),
                sum(context(r, 0) for r in batch),
                sum((1 + count) * context(r, 0) for r, (count, _) in outcomes.items()),
                block * sum(context(r, 0) for r in drafting),
            )
            true = (
                self.cost(work)
                + self.making * (work.num_tokens not in self.met)
                + (self.catching_up * before if k else 0.0)
            )
            self.met.add(work.num_tokens)
            seconds += true
            measured = (
                true
                * pace
                * float(np.exp(self.noise * self.random.standard_normal()))
                * (4 if self.random.random() < self.held_up else 1)
            )
            controller.observe(
                work, measured, outcomes, said if self.confident else None, now, bool(k and before)
            )
            waiting = 0 if k else waiting
            drafted = (
                {request: self._draft(rates)[:k] for request, rates in batch.items()} if k else {}
            )
            said = (
                {
                    request: _odds(_log_odds(p) * 1.4 + 0.6).tolist()
                    for request, p in drafted.items()
                }
                if self.confident
                else {}
            )
            verified = controller.lengths(requests, now, said if self.confident else None)
        return committed / seconds

    def _draft(self, rates: Sequence[float]) -> np.ndarray:
        """[K] each token's own probability."""
        if not self.spread:
            return np.array(rates)
        return _odds(
            _log_odds(np.array(rates)) + self.spread * self.random.standard_normal(len(rates))
        )


def _log_odds(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def _odds(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def two_cores(work: Work) -> float:
    """Seconds on two cores, of the embedded pair's kind: every row costs."""
    return 1e-3 * (
        5.0 + 0.55 * work.num_tokens + (1.8 if work.draft_rows else 0) + 0.12 * work.draft_rows
    )


def long_contexts(work: Work) -> float:
    """Seconds on two cores, where contexts cost too: a position of 32k takes as long to read as a
    plain step without, and each row meets it for a quarter of that."""
    return two_cores(work) + 1e-3 * (
        5e-3 / 32 * work.num_context
        + 1.2e-3 / 32 * work.attended
        + 0.3e-3 / 32 * work.draft_attended
    )


def large_gpu(work: Work) -> float:
    """Seconds of an 8B target on a large GPU: flat up to 180 rows, then as many as there are."""
    return 1e-3 * (
        4.2 * max(1.0, work.num_tokens / 180)
        + (0.8 + 0.001 * work.draft_rows if work.draft_rows else 0)
    )


GOOD, BAD = [0.8, 0.78, 0.76, 0.74, 0.72, 0.7, 0.68], [0.01] * 7
"""Rates of acceptance by position; the last one goes on."""


class Run:
    """One engine's steps; ``wrong`` gives what was measured in place of the true seconds, by step
    and what it computed."""

    def __init__(
        self,
        wrong: Callable[[int, Work, float], float],
        num_reqs: int = 1,
        cost: Callable[[Work], float] = two_cores,
        block: int = 8,
        catches_up: float | None = None,
        profile: Profile | None = None,
    ) -> None:
        """``catches_up``: seconds more for each step without a draft, where the next one drafts;
        None: no step is said to write a backlog. ``profile``: what was measured at warm-up, in
        place of what is true."""
        self.profile = profile or profile_of(cost, block - 1)
        self.controller = Controller(block - 1, block, profile=self.profile)
        self.wrong, self.cost = wrong, cost
        self.block, self.catches_up, self.waiting = block, catches_up, 0
        self.requests, self.random = [f"r{i}" for i in range(num_reqs)], np.random.default_rng(0)
        self.lengths: dict[str, int] = {}
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.plans: list[Plan] = []

    def run(
        self,
        steps: int,
        rates: list[float] = GOOD,
        prompts: bool = False,
        prompt_rows: Callable[[int], int] = lambda step: 0,
    ) -> list[Plan]:
        """So many more steps; returns their plans. ``prompts``: each has one in it, of
        ``prompt_rows`` by step."""
        for _ in range(steps):
            plan = self.controller.plan(self.requests)
            outcomes = {}
            for request in self.requests:
                count, accepted = self.lengths.get(request, 0), 0
                while (
                    accepted < count and self.random.random() < rates[min(accepted, len(rates) - 1)]
                ):
                    accepted += 1
                outcomes[request] = (count, accepted)
                self.tokens += accepted + 1
            num_reqs, verified = len(self.requests), sum(count for count, _ in outcomes.values())
            drafts, rows = plan.num_draft_tokens > 0, num_reqs + verified + prompt_rows(self.step)
            work = Work(num_reqs, rows, self.block * num_reqs if drafts else 0)
            seconds = self.cost(work) + (self.catches_up or 0.0) * self.waiting * drafts
            self.seconds += seconds
            self.controller.observe(
                None if prompts else work,
                self.wrong(self.step, work, seconds),
                outcomes,
                None,
                plan,
                self.catches_up is not None and drafts and self.waiting > 0,
            )
            self.waiting = 0 if drafts else self.waiting + 1
            self.lengths = self.controller.lengths(self.requests, plan)
            self.step += 1
            self.plans.append(plan)
        return self.plans[-steps:]


def drafting(plans: list[Plan]) -> float:
    """Share of the steps that drafted."""
    return sum(plan.num_draft_tokens > 0 for plan in plans) / len(plans)


def slow(last: int, factor: float, drafts: bool) -> Callable[[int, Work, float], float]:
    """Up to step ``last`` those with the drafter, or those without, take ``factor`` times as
    long."""
    return lambda step, work, seconds: (
        seconds * (factor if step < last and bool(work.draft_rows) == drafts else 1)
    )

"""Whether to draft in a step, and how many of each request's draft tokens to verify: as many as
commit the most tokens a second. Pure.

A block is drafted whole or not at all, for a shorter one costs little less and drafts worse.
Verifying some of its tokens commits one token a request, and each draft token with the probability
that it and all before it are accepted; ``StepCost`` knows the seconds, ``Acceptance`` the
probabilities. What does not look best is tried now and then: ``Trials``.

    pytest tests/unit/test_adaptive.py
"""

import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass

from vllm_dflash.adaptive.acceptance import Acceptance, Confidences
from vllm_dflash.adaptive.cost import STALE, StepCost, Work, power
from vllm_dflash.adaptive.plans import Choice, Outlook, Plan
from vllm_dflash.adaptive.trials import Trials

_FIRST_TRIES = 4
"""Steps that each of a whole block and no draft gets at once, for a batch size that was not
seen; again and again for ``STALE`` steps, if they cannot be measured."""
_EVERY = 16
"""Steps between two choices, unless the number of requests changes by more than an eighth, or
drafts tell much that is new."""
_LONGEST_EVERY = 32
"""The same where it was chosen again and again to draft nothing: the interval doubles up to
here."""
_LEARN_EVERY = 8
"""Steps that are learned from together: Python is several times as slow where between two of its
turns a model ran, which took its caches."""
_YOUNG = 64
"""Steps after which two are learned from together, and so on."""
_SWITCH = 1.01
"""The other choice has to be better by this factor, so that noise does not make it jump."""
_SAFE = 1.02
"""Drafting has to promise so much more than no drafting, which is sure of what it brings: never
slower than no speculation."""


@dataclass(frozen=True)
class Status:
    """What the controller makes of drafting, for people."""

    drafting: bool
    why: str
    """``first`` steps of a batch size; ``pays``; ``slow``: would not pay if every draft token was
    accepted; ``rejected``: too few are."""
    measured: float | None = None
    """When a step that drafts was last measured at this batch size, on ``time.monotonic``'s
    clock."""
    next_trial: float | None = None
    """Where nothing is drafted: seconds of decoding until drafting is tried again, if all goes on
    as now."""


class Controller:
    """Learns from steps and plans the next. A draft has ``max_draft`` tokens, the drafter's block
    ``block_size`` rows."""

    def __init__(
        self,
        max_draft: int,
        block_size: int,
        group: Callable[[str], Hashable] = lambda _: None,
        limit: Callable[[str], int] | None = None,
    ) -> None:
        """``group``, ``limit``: see ``Acceptance``."""
        self.max_draft, self.block_size = max_draft, block_size
        self.cost, self.acceptance = StepCost(), Acceptance(max_draft, group, limit)
        self._trials = Trials(2 * _EVERY, block_size)
        self._rough = StepCost()
        """Learned from steps with prompts or ended requests, for where there are no others."""
        self._steps, self._chosen_at, self._every = 0, 0, _EVERY
        self._tries: dict[int, list[int]] = {}
        """What is left of the first steps, by power of two of the requests: a number of requests
        may pass before all are done."""
        self._num_first: dict[int, int] = {}
        """How many first steps there were, by power of two."""
        self._rest: list[Plan] = []
        """What is left of a trial."""
        self._drafted_at: dict[int, float] = {}
        """When a draft was last measured, by power of two."""
        self._choice: Choice | None = None
        self._outlook: Outlook | None = None
        """By which the last choice was made."""
        self._seen: list[
            tuple[
                Work | None,
                float,
                Mapping[str, tuple[int, int]],
                Confidences | None,
                int,
                bool,
                Work | None,
            ]
        ] = []
        """Steps that are to be learned from."""

    def observe(
        self,
        work: Work | None,
        seconds: float,
        outcomes: Mapping[str, tuple[int, int]],
        confidences: Confidences | None = None,
        stands_for: int = 1,
        writes_backlog: bool = False,
        rough: Work | None = None,
    ) -> None:
        """Takes in a step, and learns from it by the next choice, or a few steps later. Nobody may
        change what is handed in until then.

        Args:
            work: what the step computed; None where its time tells nothing, as with a prompt in it.
            seconds: how long it took.
            outcomes: by request, draft tokens verified in it and how many of them were accepted.
            confidences: of those draft tokens, where known.
            stands_for: how many such steps there were for each that is taken in.
            writes_backlog: whether it is the first that drafts after some that did not, and writes
                the context of them all.
            rough: where ``work`` is None, what the step computed with the prompts in it, as if
                their rows were verified tokens; looked at only where all steps are such steps.
        """
        self._seen.append((work, seconds, outcomes, confidences, stands_for, writes_backlog, rough))
        # The first ones say the most.
        if len(self._seen) >= min(1 + self._steps // _YOUNG, _LEARN_EVERY) or any(
            map(self.acceptance.is_new, outcomes)
        ):
            self._learn()

    def plan(self, requests: Sequence[str], num_context: int = 0) -> Plan:
        """What to draft for these requests, which all decode; ``num_context``: positions of their
        contexts, in all."""
        kept_plan = self.kept_plan(len(requests))
        if kept_plan is not None:
            return kept_plan
        self._steps += 1
        return self._plan(requests, num_context)

    def kept_plan(self, num_reqs: int) -> Plan | None:
        """In place of ``plan``: the plan for so many requests, if there is nothing to be chosen
        yet; else None, and ``plan`` is to be asked."""
        last = self._choice
        is_due = self._steps + 1 - self._chosen_at >= self._every or self.acceptance.has_news
        if (
            last is None
            or is_due
            or self._rest
            or abs(num_reqs - last.num_reqs) * 8 > last.num_reqs
        ):
            return None
        self._steps += 1
        return last.plan

    def lengths(
        self, requests: Sequence[str], plan: Plan, confidences: Confidences | None = None
    ) -> dict[str, int]:
        """By request, how many of its draft tokens to verify; with their confidences once they are
        drafted."""
        return self.acceptance.lengths(requests, plan.num_draft_tokens, plan.threshold, confidences)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        self._learn()
        self.acceptance.forget(requests)

    def _learn(self) -> None:
        for work, seconds, outcomes, confidences, stands_for, writes_backlog, rough in self._seen:
            # The first steps of a batch size were nobody's choice: they earn and owe nothing.
            is_chosen = self._choice is not None
            if is_chosen:
                self._trials.earn(stands_for)
            if work is not None and writes_backlog:
                # It tells nothing of steps that draft after others that did, and was not in what
                # its trial was expected to lose.
                if is_chosen and self._outlook is not None:
                    self._trials.charge(seconds, self._outlook.credible(work))
            elif work is not None:
                self.cost.observe(work, seconds)
                if work.draft_rows:
                    self._drafted_at[power(work.num_reqs)] = time.monotonic()
            elif rough is not None and not writes_backlog:
                self._rough.observe(rough, seconds)
            for request, (verified, accepted) in outcomes.items():
                if verified:
                    self.acceptance.observe(
                        request,
                        verified,
                        accepted,
                        None if confidences is None else confidences.get(request),
                    )
        self._seen.clear()

    def _plan(self, requests: Sequence[str], num_context: int) -> Plan:
        if self._rest:
            return self._rest.pop()
        self._learn()
        last = self._choice
        first = self._first(len(requests))
        if first is not None:
            self._choice = None
            return first
        cost = self.cost if self.cost.has_seen(len(requests)) else self._rough
        self._chosen_at, self.acceptance.has_news = self._steps, False
        outlook = Outlook(
            cost.near(len(requests)),
            self.acceptance.expected(requests),
            len(requests),
            num_context,
            self.block_size,
        )
        self._outlook = outlook
        none, draft = outlook.weigh(0), outlook.weigh(self.max_draft)
        factor = _SAFE * (
            1.0 if last is None else _SWITCH if last.plan.num_draft_tokens == 0 else 1 / _SWITCH
        )
        best = draft if draft.rate > factor * none.rate else none
        is_off_again = (
            last is not None and last.plan.num_draft_tokens == best.plan.num_draft_tokens == 0
        )
        self._choice, self._every = (
            best,
            (min(2 * self._every, _LONGEST_EVERY) if is_off_again else _EVERY),
        )
        self._rest = self._trials.choose(self._steps, outlook, best, draft.plan)
        return self._rest.pop() if self._rest else best.plan

    def _first(self, num_reqs: int) -> Plan | None:
        """The plan of a first step of a batch size; None where both kinds of steps are known.

        Where prompts come and requests end in all of ``STALE`` first steps, what those took has to
        do. Where not even that is known, drafts are whole, as without a controller, and the first
        steps are made anew every ``STALE`` steps.
        """
        size = power(num_reqs)
        tries, count = self._tries.setdefault(size, []), self._num_first.get(size, 0)
        if not tries:
            if self.cost.has_seen(num_reqs) or (count >= STALE and self._rough.has_both(num_reqs)):
                return None
            if count < STALE or count % STALE < 2 * _FIRST_TRIES:
                tries += [self.max_draft] * _FIRST_TRIES + [0] * _FIRST_TRIES
        self._num_first[size] = count + 1
        return Plan(tries.pop(0) if tries else self.max_draft, why="first")

    def status(self) -> Status:
        """What was chosen last, and why."""
        last, outlook = self._choice, self._outlook
        if last is None or outlook is None:
            return Status(drafting=True, why="first")
        measured = self._drafted_at.get(power(last.num_reqs))
        if last.plan.num_draft_tokens:
            return Status(drafting=True, why="pays", measured=measured)
        is_slow = outlook.most_rate(self.max_draft) < last.rate
        next_trial = self._trials.until_next(
            self._steps, last.num_reqs / last.rate, self._chosen_at + self._every
        )
        return Status(False, "slow" if is_slow else "rejected", measured, next_trial)

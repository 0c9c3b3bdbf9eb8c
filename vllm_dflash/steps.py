"""One step of an engine, read once at its scheduler for all who watch: controller, metrics,
benchmark.

A request's verified and sampled tokens stand side by side in ``update_from_output`` alone, and what
a request was before the step only until it. So each step is read there, before vLLM's own code
moves on, and handed to the observers after it. Under asynchronous scheduling a step may hold
requests that ended while it ran, and a draft has the length that was scheduled. Pure: vLLM's
objects are only read.

    pytest tests/unit/test_steps.py
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from operator import mul
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from vllm_dflash.compat import num_drafted
from vllm_dflash.drafts import skipped_of
from vllm_dflash.log import logger

Names = Sequence[str]
"""Requests, by vLLM's identifiers."""


class Work(NamedTuple):
    """What one step computes."""

    num_reqs: int
    num_tokens: int
    """The target's rows: one a request and one for each draft token that is verified."""
    draft_rows: int
    """The drafter's rows, a block for each request that drafts; 0 where nothing is drafted."""
    num_context: int = 0
    """Positions of all requests' contexts."""
    attended: int = 0
    """Of each of the target's rows the positions of its request's context, in all."""
    draft_attended: int = 0
    """The same of the drafter's rows."""


class Step:
    """One step, for observers, who may change none of it. Requests that had ended when it was over
    are in none of the tables.

    Most steps are plain ones, and short: what such a step has none of stands in the class, and is
    not set.
    """

    num_requests = 0
    is_plain = False
    """Whether every request decoded, had no draft and was to have none; then the tables by request
    are left empty."""
    all_decode = False
    """Whether each request was past its prompt, and computed nothing but its last token and its
    draft; and there was one."""
    requests: Mapping[str, Any] = MappingProxyType({})
    """vLLM's ``Request``s, which for observers have taken in the step's tokens."""
    verified: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """Of each request with a draft that was verified, its draft tokens and how many of the first
    were accepted. Without those that a grammar forbids, and without what vLLM pads a request with
    whose context is there when it begins: they were not the drafter's to get right."""
    undrafted: Sequence[str] = ()
    """The requests that decode and had no draft."""
    confidences: Mapping[str, Sequence[float]] | None = None
    """By request, the drafter's confidence in each token that was verified; None where it is not
    known."""
    ended = 0.0
    outputs: Any = None
    """What ``update_from_output`` returned."""
    _committed: dict[str, int] | None = None

    def __init__(
        self,
        scheduled: Any,
        num_expected: int,
        scheduled_at: float,
        began: float | None,
        after_pause: bool,
    ) -> None:
        """A step, before its requests are looked at; times are on ``time.perf_counter``'s clock.

        Args:
            scheduled: vLLM's ``SchedulerOutput``.
            num_expected: K that the step before was given: 0 says why this one has no drafts.
            scheduled_at: when ``schedule`` was last called: under synchronous scheduling for this
                step.
            began: when the step before ended; after a pause, when there was work again; None where
                neither is known.
            after_pause: whether nothing was left to do before it.
        """
        self.scheduled, self.num_expected = scheduled, num_expected
        self.num_drafted = num_drafted(scheduled)
        """K of the step: the tokens that each request drafts in it, for the next; 0 for no drafter
        forward."""
        self.scheduled_at, self.began, self.after_pause = scheduled_at, began, after_pause

    def decoding_began(self, is_synchronous: bool) -> float | None:
        """When what it takes began; None where that is not known. What comes between two steps,
        such as the handling of outputs, is part of a step's cost; a wait longer than it was
        somebody else's."""
        if not is_synchronous:
            return None if self.after_pause else self.began
        began, scheduled = self.began, self.scheduled_at
        is_wait = self.after_pause or began is None or scheduled - began > self.ended - scheduled
        return scheduled if is_wait else began

    @property
    def num_planned(self) -> int:
        """K that the scheduler gave the step: why the next has drafts or none. 0.33 may draft none
        all the same."""
        planned: int = self.scheduled.num_spec_tokens_to_schedule
        return planned

    @property
    def num_ended(self) -> int:
        """Requests that were scheduled and had ended when the step was over."""
        return len(self.scheduled.num_scheduled_tokens) - self.num_requests

    @property
    def num_context(self) -> int:
        """Positions of all requests' contexts, in all, as they were scheduled; of steps that only
        decode."""
        scheduled = self.scheduled
        before = sum(scheduled.scheduled_cached_reqs.num_computed_tokens) + sum(
            n.num_computed_tokens for n in scheduled.scheduled_new_reqs
        )
        return before + scheduled.total_num_scheduled_tokens

    @property
    def contexts(self) -> dict[str, int]:
        """By request, the positions of its context, as it was scheduled."""
        scheduled, cached = self.scheduled, self.scheduled.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        return {name: before[name] + n for name, n in scheduled.num_scheduled_tokens.items()}

    def work(self, block: int) -> Work:
        """What was computed, with ``block`` rows of the drafter's for each request that it drafted
        for; of steps that only decode."""
        counts, num_tokens = (
            self.scheduled.num_scheduled_tokens,
            self.scheduled.total_num_scheduled_tokens,
        )
        num_reqs, attended = len(counts), self.num_context  # a row for each
        drafting, read = num_reqs if block else 0, attended
        seen, skipped = read if block else 0, skipped_of(self.num_planned) if block else ()
        if skipped or num_tokens > num_reqs:
            contexts = self.contexts
            attended = sum(map(mul, counts.values(), contexts.values()))
            if skipped:
                drafted = [n for name, n in contexts.items() if name not in skipped]
                drafting, seen = len(drafted), sum(drafted)
        return Work(num_reqs, num_tokens, drafting * block, read, attended, seen * block)

    @property
    def committed(self) -> Mapping[str, int]:
        """By request, the tokens that became output: without those past its end."""
        if self._committed is None:
            self._committed = {
                out.request_id: len(out.new_token_ids)
                for each in self.outputs.values()
                for out in each.outputs
            }
        return self._committed

    @property
    def num_committed(self) -> int:
        """Of all requests."""
        return self.num_requests if self.is_plain else sum(self.committed.values())


class Observer(Protocol):
    """Whoever watches steps. One that raises hears no more, and neither vLLM nor the others
    notice."""

    what: str
    """Its name in the log."""

    def observe(self, step: Step) -> None:
        """Takes in a step, after vLLM has."""

    def close(self) -> None:
        """There are no more steps: the engine ends, or the observer failed."""


class Steps:
    """The steps of one scheduler, and who watches them."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._observers: list[Observer] = []
        self._planned = 1
        """K that the last step was given."""
        self._began: float | None = None
        self._after_pause, self._scheduled_at = True, 0.0

    def add(self, observer: Observer) -> None:
        """It gets every step from now on."""
        self._observers.append(observer)

    def around_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``schedule``: notes when work begins."""

        @functools.wraps(schedule)
        def scheduling(*args: Any, **kwargs: Any) -> Any:
            self._scheduled_at = time.perf_counter()
            if self._began is None:
                self._began = self._scheduled_at
            return schedule(*args, **kwargs)

        return scheduling

    def around_update(self, update: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Around ``update_from_output``: reads a step, and hands it on."""

        @functools.wraps(update)
        def updating(scheduled: Any, ran: Any) -> Any:
            if not self._observers:
                return update(scheduled, ran)
            try:
                step = self._read(scheduled, ran)
            except Exception:
                for observer in list(self._observers):
                    self._fail(observer)
                return update(scheduled, ran)
            step.outputs = outputs = update(scheduled, ran)
            self._hand_on(step)
            return outputs

        return updating

    def around_shutdown(self, shutdown: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``shutdown``: the observers close."""

        @functools.wraps(shutdown)
        def shutting_down(*args: Any, **kwargs: Any) -> Any:
            for observer in self._observers:
                self._close(observer)
            self._observers.clear()
            return shutdown(*args, **kwargs)

        return shutting_down

    def _read(self, scheduled: Any, ran: Any) -> Step:
        step = Step(scheduled, self._planned, self._scheduled_at, self._began, self._after_pause)
        if self._planned == 0 and self._is_plain(scheduled):
            step.is_plain = step.all_decode = True
            step.num_requests = len(scheduled.num_scheduled_tokens)
        else:
            self._fill(step, ran)
        return step

    def _is_plain(self, scheduled: Any) -> bool:
        """Whether all requests decode without drafts: without a loop in Python, for these are the
        shortest steps."""
        counts, scheduler = scheduled.num_scheduled_tokens, self._scheduler
        return (
            not scheduled.scheduled_spec_decode_tokens
            and not scheduled.scheduled_new_reqs
            and scheduled.total_num_scheduled_tokens == len(counts) > 0
            and all(scheduled.scheduled_cached_reqs.num_output_tokens)
            # Else some ended while the step ran. A connector may keep those for a while.
            and scheduler.connector is None
            and counts.keys() <= scheduler.requests.keys()
        )

    def _fill(self, step: Step, ran: Any) -> None:
        """The tables by request."""
        scheduled, known, sampled, index = (
            step.scheduled,
            self._scheduler.requests,
            ran.sampled_token_ids,
            ran.req_id_to_index,
        )
        drafts, forbidden = (
            scheduled.scheduled_spec_decode_tokens,
            scheduled.num_invalid_spec_tokens,
        )
        requests: dict[str, Any] = {}
        verified: dict[str, tuple[int, int]] = {}
        undrafted, all_decode = [], True
        beginning = {new.req_id for new in scheduled.scheduled_new_reqs}
        beginning |= scheduled.scheduled_cached_reqs.resumed_req_ids
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = known.get(request_id)
            # Under asynchronous scheduling a step may hold requests that ended while it ran.
            if request is None or request.is_finished():
                continue
            requests[request_id] = request
            length = len(drafts.get(request_id, ()))
            decodes = num_tokens == 1 + length and request.num_output_tokens > 0
            all_decode &= decodes
            accepted = (
                len(sampled[index[request_id]]) - 1
                if length and sampled and request_id in index and request_id not in beginning
                else -1
            )
            if accepted >= 0:
                verified[request_id] = (
                    length - (forbidden.get(request_id, 0) if forbidden else 0),
                    accepted,
                )
            elif decodes:
                undrafted.append(request_id)
        step.requests, step.verified, step.undrafted = requests, verified, undrafted
        step.num_requests, step.all_decode = len(requests), all_decode and bool(requests)
        if verified:
            # Our schedulers keep what the drafter said of the drafts that are verified.
            step.confidences = getattr(self._scheduler, "confidences", None)

    def _hand_on(self, step: Step) -> None:
        step.ended, scheduler = time.perf_counter(), self._scheduler
        # With nothing left to do the engine waits, and the time to the next step's end is not that
        # step's.
        self._after_pause = not (scheduler.running or scheduler.waiting)
        self._began = None if self._after_pause else step.ended
        if step.num_requests:
            self._planned = step.num_planned
        for observer in tuple(self._observers):
            try:
                observer.observe(step)
            except Exception:
                self._fail(observer)

    def _fail(self, observer: Observer) -> None:
        """What watches must not end what serves."""
        logger.exception("%s: ended here, as it failed; serving goes on", observer.what)
        self._observers.remove(observer)
        self._close(observer)

    @staticmethod
    def _close(observer: Observer) -> None:
        try:
            observer.close()
        except Exception:
            logger.exception("%s: could not be closed", observer.what)

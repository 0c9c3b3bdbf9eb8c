"""The engine's side: what becomes of drafts, what steps take, what the controller chooses; seen at vLLM's scheduler.

It watches the two methods of the engine's scheduler that begin and end a step, so it is the same for vLLM's schedulers and for ours.
Under asynchronous scheduling a draft counts at the length that was scheduled, and steps overlap: a step's time is from the end of the
one before to its own. Limits: confidences are known under synchronous scheduling only.

    pytest tests/engine/test_metrics.py
"""

import functools
import time
from collections import deque
from typing import Any

from vllm_dflash import __version__
from vllm_dflash.adaptive.controller import Status
from vllm_dflash.adaptive.cost import Work
from vllm_dflash.adaptive.settings import is_adaptive
from vllm_dflash.checks import settled
from vllm_dflash.compat import num_drafted
from vllm_dflash.formats import is_ours
from vllm_dflash.log import logger
from vllm_dflash.metrics.catalog import BY_NAME, CONFIDENCE_BUCKETS, CONTEXT_STARTS, confidence_bucket, context_bucket
from vllm_dflash.metrics.counts import Histogram, Positions, Speedup
from vllm_dflash.metrics.recorder import Recorder
from vllm_dflash.patches import scheduler_watch
from vllm_dflash.plugin import patch_set

STEP_KINDS = ("prefill", "speculative", "partial", "plain")
_LAST = 9
"""Steps of a kind with about as many requests whose median is taken."""
_FEWEST = 3
"""Of them, before there is one."""
_HELD_UP = 4.0
"""A step that took so many medians of its kind was held up from outside, as a plain one would have been; it says nothing of a speed-up."""
_REFRESH = 128
"""Steps for which an answer of the cost model is kept."""


def attach(scheduler: Any) -> None:
    """Records what vLLM's ``Scheduler`` sees, where it speculates with one of our drafters; else does nothing."""
    speculative = scheduler.vllm_config.speculative_config
    if not is_ours(speculative):
        return
    record = EngineRecord(scheduler.vllm_config, scheduler)
    if not patch_set().attach(scheduler, scheduler_watch.PATCHES, record):
        record.recorder.close()


class _Request:
    """What is kept of a request that runs."""

    __slots__ = ("accepted", "prefix_cached", "verifications")

    def __init__(self, prefix_cached: bool) -> None:
        self.prefix_cached, self.verifications, self.accepted = prefix_cached, 0, 0


class EngineRecord:
    """Counts of one engine."""

    def __init__(self, vllm_config: Any, scheduler: Any) -> None:
        self.scheduler, self.adaptive = scheduler, is_adaptive(vllm_config)
        self.block_size = settled(vllm_config.speculative_config.draft_model_config.hf_config).block_size
        self.max_model_len = vllm_config.model_config.max_model_len
        self.accepted_length, self.draft_length, self.request_accepted_length = (
            Histogram(BY_NAME[name].buckets) for name in ("accepted_length", "draft_length", "request_accepted_length")
        )
        self.step_seconds = {kind: Histogram(BY_NAME["step_seconds"].buckets) for kind in STEP_KINDS}
        # Zero from the start: Prometheus rates a counter from its first sample on, and guesses what was before, for each its own way.
        self.verified, self.reached, self.accepted = (Positions(vllm_config.speculative_config.num_speculative_tokens) for _ in range(3))
        self.output = dict.fromkeys(("prefill", "speculative", "plain"), 0)
        self.context = {
            (context_bucket(start), cached): [0, 0] for start in CONTEXT_STARTS if start < self.max_model_len for cached in ("false", "true")
        }  # fmt: skip
        """Verifications and committed tokens."""
        self.refused: dict[str, int] = {}
        self.controller: dict[tuple[str, str], int] = {}
        self.confident, self.confident_accepted = [0] * CONFIDENCE_BUCKETS, [0] * CONFIDENCE_BUCKETS
        self.speedup = Speedup()
        self._last: dict[tuple[str, int], deque[float]] = {}
        """By kind and size of step, seconds of the last ones."""
        self._model: dict[int, tuple[int, float | None]] = {}
        self._requests: dict[str, _Request] = {}
        self._last_end: float | None = None
        self._last_k = 1
        self._steps, self.failed = 0, False
        self._info = _info(vllm_config, self.block_size, self.adaptive)
        self.recorder = Recorder("engine", vllm_config, self.samples)

    def watch_schedule(self, schedule: Any) -> Any:
        """Around ``schedule``: notes when work begins."""

        @functools.wraps(schedule)
        def watching(*args: Any, **kwargs: Any) -> Any:
            if self._last_end is None:
                self._last_end = time.perf_counter()
            return schedule(*args, **kwargs)

        return watching

    def watch_update(self, update: Any) -> Any:
        """Around ``update_from_output``: there a request's verified and sampled tokens stand side by side."""

        @functools.wraps(update)
        def watching(scheduled: Any, ran: Any) -> Any:
            if self.failed:
                return update(scheduled, ran)
            try:
                plain = self._is_plain(scheduled)
                rows = [] if plain else self._rows(scheduled, ran)
            except Exception:
                self._fail()
                return update(scheduled, ran)
            outputs = update(scheduled, ran)
            try:
                with self.recorder.lock:
                    if plain:
                        self._observe_plain(scheduled)
                    else:
                        self._observe(scheduled, rows, outputs)
                    self.recorder.dirty = True
            except Exception:
                self._fail()
            return outputs

        return watching

    def watch_shutdown(self, shutdown: Any) -> Any:
        """Around ``shutdown``: an engine that has ended has no series."""

        @functools.wraps(shutdown)
        def watching(*args: Any, **kwargs: Any) -> Any:
            self.recorder.close()
            return shutdown(*args, **kwargs)

        return watching

    def _fail(self) -> None:
        """What counts must not end what serves: the series end instead, and the log says why."""
        self.failed = True
        self.recorder.close()
        logger.exception("the metrics of this engine's speculation end here, as they failed; serving goes on")

    def _is_plain(self, scheduled: Any) -> bool:
        """Whether all requests of a step decode and were to have no drafts, which ``_observe_plain`` counts in little time."""
        return (
            self._last_k == 0
            and not scheduled.scheduled_spec_decode_tokens
            and not scheduled.scheduled_new_reqs
            and scheduled.total_num_scheduled_tokens == len(scheduled.num_scheduled_tokens) > 0
            and all(scheduled.scheduled_cached_reqs.num_output_tokens)
            # Else some ended while the step ran. A connector may keep those for a while.
            and self.scheduler.connector is None
            and scheduled.num_scheduled_tokens.keys() <= self.scheduler.requests.keys()
        )

    def _observe_plain(self, scheduled: Any) -> None:
        """As ``_observe`` of rows that all decode without drafts."""
        count = len(scheduled.num_scheduled_tokens)  # and of the output tokens
        self.output["plain"] += count
        self.draft_length.observe(0, count)
        reason = self._why_none(None)
        self.refused[reason] = self.refused.get(reason, 0) + count
        for request_id in (*self.scheduler.finished_req_ids, *scheduled.finished_req_ids):
            self._finish(request_id)
        self._step(scheduled, count, True, False, count)

    def _rows(self, scheduled: Any, ran: Any) -> list[tuple[str, Any, int, int, int]]:
        """By request: verified draft tokens, sampled tokens and its context so far; read before the scheduler moves on."""
        for new in scheduled.scheduled_new_reqs:
            self._requests[new.req_id] = _Request(new.num_computed_tokens > 0)
        rows, requests, drafts, sampled = [], self.scheduler.requests, scheduled.scheduled_spec_decode_tokens, ran.sampled_token_ids
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = requests.get(request_id)
            # Under asynchronous scheduling a step may hold requests that ended while it ran.
            if request is None or request.is_finished():
                continue
            verified, index = len(drafts.get(request_id, ())), ran.req_id_to_index.get(request_id)
            tokens = len(sampled[index]) if sampled and index is not None else 0
            decodes = request.num_output_tokens > 0 and num_tokens == 1 + verified
            rows.append((request_id, request, verified, tokens, request.num_tokens if decodes else -1))
        return rows

    def _observe(self, scheduled: Any, rows: list[tuple[str, Any, int, int, int]], outputs: Any) -> None:
        committed = {out.request_id: len(out.new_token_ids) for each in outputs.values() for out in each.outputs}
        invalid, all_decode, num_committed, any_verified = scheduled.num_invalid_spec_tokens or {}, bool(rows), 0, False
        for request_id, request, verified, tokens, context in rows:
            count = committed.get(request_id, 0)
            num_committed += count
            if verified and tokens:
                any_verified = True
                self.output["speculative"] += count
                # Tokens that a grammar forbids were not the drafter's to get right.
                self._verification(request_id, request, verified - invalid.get(request_id, 0), tokens - 1)
            elif context >= 0:
                self.output["plain"] += count
                self.draft_length.observe(0)
                reason = self._why_none(request)
                self.refused[reason] = self.refused.get(reason, 0) + 1
            else:
                self.output["prefill"] += count
            all_decode &= context >= 0
            if request.is_finished():
                self._finish(request_id)
        for request_id in scheduled.finished_req_ids:
            self._finish(request_id)
        if rows:
            self._step(scheduled, len(rows), all_decode, any_verified, num_committed)

    def _verification(self, request_id: str, request: Any, verified: int, accepted: int) -> None:
        self.draft_length.observe(verified)
        self.accepted_length.observe(accepted + 1)
        self.verified.add(verified)
        self.reached.add(min(accepted + 1, verified))
        self.accepted.add(accepted)
        known = self._requests.setdefault(request_id, _Request(False))
        known.verifications += 1
        known.accepted += accepted
        counts = self.context.setdefault((context_bucket(request.num_tokens), str(known.prefix_cached).lower()), [0, 0])
        counts[0] += 1
        counts[1] += accepted + 1
        confidences = self.scheduler._confidences.get(request_id, ()) if self.adaptive else ()
        for position, confidence in enumerate(confidences[: min(accepted + 1, verified)]):
            bucket = min(int(confidence * CONFIDENCE_BUCKETS), CONFIDENCE_BUCKETS - 1)
            self.confident[bucket] += 1
            self.confident_accepted[bucket] += position < accepted

    def _why_none(self, request: Any) -> str:
        if self._last_k == 0:
            return "controller" if self.adaptive else "batch_size"
        if request.num_tokens + self.block_size >= self.max_model_len:
            return "max_model_len"
        if request.use_structured_output:
            return "grammar"
        return "controller" if self.adaptive else "other"

    def _finish(self, request_id: str) -> None:
        known = self._requests.pop(request_id, None)
        if known is not None and known.verifications:
            self.request_accepted_length.observe(1 + known.accepted / known.verifications)

    def _step(self, scheduled: Any, num_reqs: int, all_decode: bool, any_verified: bool, committed: int) -> None:
        # What was planned is why the next step has drafts or none; what was drafted is what this one took its time for.
        now, began, planned, k = time.perf_counter(), self._last_end, scheduled.num_spec_tokens_to_schedule, num_drafted(scheduled)
        self._last_end = now if self.scheduler.running or self.scheduler.waiting else None
        self._last_k = planned
        self._steps += 1
        if self.adaptive and all_decode:
            choice = ("draft" if planned else "plain", self.scheduler.plan.why)
            self.controller[choice] = self.controller.get(choice, 0) + 1
        if began is None:
            return
        seconds = now - began
        kind = "prefill" if not all_decode else ("plain", "partial", "speculative")[(k > 0) + any_verified]
        self.step_seconds[kind].observe(seconds)
        if not all_decode:
            return
        usual = self._median(kind, num_reqs)
        self._last.setdefault((kind, num_reqs.bit_length()), deque(maxlen=_LAST)).append(seconds)
        plain = self._cost_model(num_reqs) if self.adaptive else self._median("plain", num_reqs)
        if plain is not None and usual is not None and seconds < _HELD_UP * usual:
            self.speedup.observe(num_reqs, committed, seconds, plain)

    def _median(self, kind: str, num_reqs: int) -> float | None:
        """Seconds of such steps lately; None before there were a few."""
        seconds = self._last.get((kind, num_reqs.bit_length()), ())
        return None if len(seconds) < _FEWEST else sorted(seconds)[len(seconds) // 2]

    def _cost_model(self, num_reqs: int) -> float | None:
        """Seconds of a plain step by what the controller has measured; None before it has seen such a batch."""
        cost = self.scheduler.controller.cost
        at, known = self._model.get(num_reqs, (-_REFRESH, None))
        if self._steps - at >= _REFRESH or (known is None and self._steps - at >= 8):
            known = cost.near(num_reqs).seconds(Work(num_reqs, num_reqs, 0, self._num_context())) if cost.has_seen(num_reqs) else None
            self._model[num_reqs] = (self._steps, known)
        return known

    def _num_context(self) -> int:
        return sum(request.num_computed_tokens for request in self.scheduler.running)

    def samples(self) -> dict[str, list[Any]]:
        """Everything, for a snapshot."""
        found: dict[str, list[Any]] = {
            "accepted_length": [([], self.accepted_length.sample())],
            "draft_length": [([], self.draft_length.sample())],
            "request_accepted_length": [([], self.request_accepted_length.sample())],
            "step_seconds": [([kind], histogram.sample()) for kind, histogram in self.step_seconds.items()],
            "verified_tokens": self.verified.samples(),
            "reached_tokens": self.reached.samples(),
            "accepted_tokens": self.accepted.samples(),
            "output_tokens": [([step], count) for step, count in self.output.items()],
            "context_verifications": [(list(labels), counts[0]) for labels, counts in sorted(self.context.items())],
            "context_committed_tokens": [(list(labels), counts[1]) for labels, counts in sorted(self.context.items())],
            "speculation_refused": [([reason], count) for reason, count in sorted(self.refused.items())],
            "controller_steps": [(list(labels), count) for labels, count in sorted(self.controller.items())],
            "drafter_info": [(self._info, 1)],
        }
        if self.adaptive:
            names = [[confidence_bucket(i)] for i in range(CONFIDENCE_BUCKETS)]
            found["confidence_tokens"] = list(zip(names, self.confident, strict=True))
            found["confidence_accepted_tokens"] = list(zip(names, self.confident_accepted, strict=True))
            found |= drafting_samples(self.scheduler.controller.status(), time.monotonic())
        if self.speedup.recent is not None:
            found["baseline_seconds"], found["measured_seconds"] = [([], self.speedup.baseline)], [([], self.speedup.measured)]
            found["estimated_speedup"] = [(["cost_model" if self.adaptive else "plain_steps"], self.speedup.recent)]
        return found


def drafting_samples(status: Status, now: float) -> dict[str, list[Any]]:
    """What the controller makes of drafting, ``now`` on ``time.monotonic``'s clock."""
    found: dict[str, list[Any]] = {"drafting": [([status.why], int(status.drafting))]}
    if status.measured is not None:
        found["draft_measured_age_seconds"] = [([], now - status.measured)]
    if status.next_trial is not None:
        found["next_trial_seconds"] = [([], status.next_trial)]
    return found


def _info(vllm_config: Any, block_size: int, adaptive: bool) -> list[str]:
    speculative = vllm_config.speculative_config
    architecture = speculative.draft_model_config.architectures[0]
    return [
        str(speculative.draft_model_config.model), architecture, str(block_size), str(speculative.num_speculative_tokens),
        str(adaptive).lower(), __version__,
    ]  # fmt: skip

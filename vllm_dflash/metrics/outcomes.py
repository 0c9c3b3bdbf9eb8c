"""What becomes of drafts and requests: lengths, positions, contexts, confidences, and why there was
no draft. Pure.

pytest tests/unit/test_metrics_engine.py
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_dflash.acceptance import Positions, tau
from vllm_dflash.metrics.catalog import (
    BY_NAME,
    CONFIDENCE_BUCKETS,
    CONTEXT_STARTS,
    MOST_CLASSES,
    OTHER_CLASSES,
    confidence_bucket,
    context_bucket,
)
from vllm_dflash.metrics.counts import Histogram, by_position
from vllm_dflash.request_limits import Limits
from vllm_dflash.steps import Step


class _Request:
    """What is kept of a request that runs."""

    __slots__ = ("accepted", "prefix_cached", "verifications")

    def __init__(self, prefix_cached: bool) -> None:
        self.prefix_cached, self.verifications, self.accepted = prefix_cached, 0, 0


class Outcomes:
    """Counts of one engine's steps. Without adaptive drafting there are no confidences, and nobody
    but vLLM chose K."""

    def __init__(
        self,
        max_draft: int,
        block_size: int,
        max_model_len: int,
        adaptive: bool,
        limits: Limits | None = None,
    ) -> None:
        """``limits``: what requests' users say, at any time."""
        said = Limits(max_draft) if limits is None else limits
        self._limits, self._classes = said.by_request, said.classes
        self.block_size, self.max_model_len, self.adaptive = block_size, max_model_len, adaptive
        self.accepted_length, self.draft_length, self.request_accepted_length = (
            Histogram(BY_NAME[name].buckets)
            for name in ("accepted_length", "draft_length", "request_accepted_length")
        )
        # Zero from the start: Prometheus rates a counter from its first sample on, and guesses what
        # was before, for each its own way.
        self.verified, self.reached, self.accepted = (Positions(max_draft) for _ in range(3))
        self.output = dict.fromkeys(("prefill", "speculative", "plain"), 0)
        self.context: dict[tuple[str, str], list[int]] = {}
        """Verifications and committed tokens."""
        for start in CONTEXT_STARTS:
            if start < max_model_len:
                self.context |= {
                    (context_bucket(start), cached): [0, 0] for cached in ("false", "true")
                }
        self.prompt_class: dict[str, list[int]] = {}
        """The same by the prompts' classes, ``MOST_CLASSES`` of them and one for all others."""
        self.refused: dict[str, int] = {}
        self.confident, self.confident_accepted = [0] * CONFIDENCE_BUCKETS, [0] * CONFIDENCE_BUCKETS
        self._requests: dict[str, _Request] = {}

    def observe(self, step: Step, finished: Iterable[str]) -> None:
        """Takes in a step, and which requests have ended since."""
        # First those that ended before the step: their ids may come again in it.
        for request_id in step.scheduled.finished_req_ids:
            self._finish(request_id)
        for new in step.scheduled.scheduled_new_reqs:
            self._requests[new.req_id] = _Request(new.num_computed_tokens > 0)
        if step.is_plain:
            count = step.num_requests
            self.output["plain"] += step.num_committed
            self.draft_length.observe(0, count)
            off = self._num_off(step)
            self._refuse("request", off)
            self._refuse("controller" if self.adaptive else "batch_size", count - off)
        else:
            self._by_request(step)
        for request_id in finished:
            self._finish(request_id)

    def _by_request(self, step: Step) -> None:
        committed, confidences = step.committed, step.confidences or {}
        for request_id, (verified, accepted) in step.verified.items():
            self.output["speculative"] += committed.get(request_id, 0)
            self._verification(
                request_id,
                step.requests[request_id],
                verified,
                accepted,
                confidences.get(request_id, ()),
            )
        for request_id in step.undrafted:
            self.output["plain"] += committed.get(request_id, 0)
            self.draft_length.observe(0)
            self._refuse(self._why_none(step, request_id), 1)
        if not step.all_decode:
            others = step.requests.keys() - step.verified.keys() - set(step.undrafted)
            self.output["prefill"] += sum(committed.get(request_id, 0) for request_id in others)

    def _verification(
        self,
        request_id: str,
        request: Any,
        verified: int,
        accepted: int,
        confidences: Sequence[float],
    ) -> None:
        reached = min(accepted + 1, verified)
        self.draft_length.observe(verified)
        self.accepted_length.observe(accepted + 1)
        self.verified.add(verified)
        self.reached.add(reached)
        self.accepted.add(accepted)
        known = self._requests.setdefault(request_id, _Request(False))
        known.verifications += 1
        known.accepted += accepted
        labels = context_bucket(request.num_tokens), str(known.prefix_cached).lower()
        counts = self.context.setdefault(labels, [0, 0])
        counts[0] += 1
        counts[1] += accepted + 1
        if self._classes and (name := self._classes.get(request_id)) is not None:
            self._count_class(name, accepted + 1)
        for position, confidence in enumerate(confidences[:reached]):
            bucket = min(int(confidence * CONFIDENCE_BUCKETS), CONFIDENCE_BUCKETS - 1)
            self.confident[bucket] += 1
            self.confident_accepted[bucket] += position < accepted

    def _count_class(self, name: str, committed: int) -> None:
        if name not in self.prompt_class and len(self.prompt_class) >= MOST_CLASSES:
            name = OTHER_CLASSES
        counts = self.prompt_class.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += committed

    def _num_off(self, step: Step) -> int:
        """Requests of a step whose users want no drafts."""
        if not self._limits:
            return 0
        return sum(self._limits.get(name) == 0 for name in step.scheduled.num_scheduled_tokens)

    def _refuse(self, reason: str, count: int) -> None:
        if count:
            self.refused[reason] = self.refused.get(reason, 0) + count

    def _why_none(self, step: Step, request_id: str) -> str:
        request = step.requests[request_id]
        if self._limits.get(request_id) == 0:
            return "request"
        if step.num_expected == 0:
            return "controller" if self.adaptive else "batch_size"
        if request.num_tokens + self.block_size >= self.max_model_len:
            return "max_model_len"
        if request.use_structured_output:
            return "grammar"
        return "controller" if self.adaptive else "other"

    def _finish(self, request_id: str) -> None:
        known = self._requests.pop(request_id, None)
        if known is not None and (mean := tau(known.accepted, known.verifications)) is not None:
            self.request_accepted_length.observe(mean)

    def samples(self) -> dict[str, list[Any]]:
        """Everything, for a snapshot."""
        context, classes = sorted(self.context.items()), sorted(self.prompt_class.items())
        found: dict[str, list[Any]] = {
            "accepted_length": [([], self.accepted_length.sample())],
            "draft_length": [([], self.draft_length.sample())],
            "request_accepted_length": [([], self.request_accepted_length.sample())],
            "verified_tokens": by_position(self.verified),
            "reached_tokens": by_position(self.reached),
            "accepted_tokens": by_position(self.accepted),
            "output_tokens": [([step], count) for step, count in self.output.items()],
            "context_verifications": [(list(labels), counts[0]) for labels, counts in context],
            "context_committed_tokens": [(list(labels), counts[1]) for labels, counts in context],
            "prompt_class_verifications": [([name], n) for name, (n, _) in classes],
            "prompt_class_committed_tokens": [([name], n) for name, (_, n) in classes],
            "speculation_refused": [
                ([reason], count) for reason, count in sorted(self.refused.items())
            ],
        }
        if self.adaptive:
            names = [[confidence_bucket(i)] for i in range(CONFIDENCE_BUCKETS)]
            found["confidence_tokens"] = list(zip(names, self.confident, strict=True))
            found["confidence_accepted_tokens"] = list(
                zip(names, self.confident_accepted, strict=True)
            )
        return found

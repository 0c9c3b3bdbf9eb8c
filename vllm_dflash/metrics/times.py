"""What steps take, and what plain decoding would have taken for the same tokens. Pure.

pytest tests/unit/test_metrics_engine.py
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from vllm_dflash.metrics.catalog import BY_NAME
from vllm_dflash.metrics.counts import Histogram, Speedup
from vllm_dflash.steps import Step

STEP_KINDS = ("prefill", "speculative", "partial", "plain")
_LAST = 9
"""Steps of a kind with about as many requests whose median is taken."""
_FEWEST = 3
"""Of them, before there is one."""
_HELD_UP = 4.0
"""A step that took so many medians of its kind was held up from outside, as a plain one would have
been; it says nothing of a speed-up."""
_REFRESH = 128
"""Steps for which an answer of the cost model is kept."""
_ASKED_AGAIN = 8
"""The same where it had none."""


class StepTimes:
    """Seconds of one engine's steps, by kind, and the speed-up that they make."""

    def __init__(self, cost_model: Callable[[int], float | None] | None) -> None:
        """``cost_model``: seconds of a plain step of so many requests, or None where that is not
        known; without one, plain steps say."""
        self._cost_model = cost_model
        self.step_seconds = {
            kind: Histogram(BY_NAME["step_seconds"].buckets) for kind in STEP_KINDS
        }
        self.speedup = Speedup()
        self._last: dict[tuple[str, int], deque[float]] = {}
        """By kind and size of step, seconds of the last ones."""
        self._known: dict[int, tuple[int, float | None]] = {}
        """By number of requests, what the cost model said, and at which step."""
        self._steps = 0

    def observe(self, step: Step) -> None:
        """Takes in a step of at least one request."""
        self._steps += 1
        if step.began is None:
            return
        seconds, num_reqs = step.ended - step.began, step.num_requests
        # What was drafted is what this step took its time for.
        kind = (
            ("plain", "partial", "speculative")[(step.num_drafted > 0) + bool(step.verified)]
            if step.all_decode
            else "prefill"
        )
        self.step_seconds[kind].observe(seconds)
        if not step.all_decode:
            return
        usual = self._median(kind, num_reqs)
        self._last.setdefault((kind, num_reqs.bit_length()), deque(maxlen=_LAST)).append(seconds)
        plain = (
            self._median("plain", num_reqs)
            if self._cost_model is None
            else self._modelled(num_reqs, self._cost_model)
        )
        if plain is not None and usual is not None and seconds < _HELD_UP * usual:
            self.speedup.observe(num_reqs, step.num_committed, seconds, plain)

    def _median(self, kind: str, num_reqs: int) -> float | None:
        """Seconds of such steps lately; None before there were a few."""
        seconds = self._last.get((kind, num_reqs.bit_length()), ())
        return None if len(seconds) < _FEWEST else sorted(seconds)[len(seconds) // 2]

    def _modelled(self, num_reqs: int, cost_model: Callable[[int], float | None]) -> float | None:
        at, known = self._known.get(num_reqs, (-_REFRESH, None))
        if self._steps - at >= (_ASKED_AGAIN if known is None else _REFRESH):
            known = cost_model(num_reqs)
            self._known[num_reqs] = self._steps, known
        return known

    def samples(self) -> dict[str, list[Any]]:
        """Everything, for a snapshot."""
        found: dict[str, list[Any]] = {
            "step_seconds": [
                ([kind], histogram.sample()) for kind, histogram in self.step_seconds.items()
            ]
        }
        if self.speedup.recent is not None:
            found["baseline_seconds"], found["measured_seconds"] = (
                [([], self.speedup.baseline)],
                [([], self.speedup.measured)],
            )
            found["estimated_speedup"] = [
                (["plain_steps" if self._cost_model is None else "cost_model"], self.speedup.recent)
            ]
        return found

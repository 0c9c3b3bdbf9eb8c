"""The engine's side of the metrics: watches steps, has them counted (``outcomes``) and timed
(``times``), and writes what is known.

It is the same for vLLM's schedulers and for ours. Under asynchronous scheduling a draft counts at
the length that was scheduled, and steps overlap: a step's time is from the end of the one before to
its own. Limits: confidences are known under synchronous scheduling only.

    pytest tests/unit/test_metrics_engine.py tests/engine/test_metrics.py
"""

import time
from typing import Any

from vllm_dflash import __version__
from vllm_dflash.checks import drafter_config
from vllm_dflash.metrics.drafting import drafting_samples, status_of
from vllm_dflash.metrics.outcomes import Outcomes
from vllm_dflash.metrics.recorder import Recorder
from vllm_dflash.metrics.times import StepTimes
from vllm_dflash.patches.request_drafts import limits_of
from vllm_dflash.patches.scheduler_steps import watch
from vllm_dflash.steps import Step


def attach(scheduler: Any) -> None:
    """Records what the ``Scheduler`` of an engine with one of our drafters sees."""
    record = EngineRecord(scheduler.vllm_config, scheduler)
    if not watch(scheduler, record):
        record.close()


class EngineRecord:
    """Watches one engine's steps."""

    what = "metrics of this engine's speculation"

    def __init__(self, vllm_config: Any, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.adaptive: bool = getattr(scheduler, "adapts", False)  # ours says so
        speculative = vllm_config.speculative_config
        block_size = drafter_config(speculative.draft_model_config.hf_config).block_size
        self.outcomes = Outcomes(
            speculative.num_speculative_tokens,
            block_size,
            vllm_config.model_config.max_model_len,
            self.adaptive,
            limits_of(scheduler),
        )
        self.times = StepTimes(self._plain_seconds if self.adaptive else None)
        self.controller: dict[tuple[str, str], int] = {}
        self._info = _info(vllm_config, block_size, self.adaptive)
        self.recorder = Recorder("engine", vllm_config, self.samples)

    def observe(self, step: Step) -> None:
        """Counts a step."""
        with self.recorder.lock:
            self.outcomes.observe(step, self.scheduler.finished_req_ids)
            if step.num_requests:
                if self.adaptive and step.all_decode:
                    choice = ("draft" if step.num_planned else "plain", self.scheduler.plan.why)
                    self.controller[choice] = self.controller.get(choice, 0) + 1
                self.times.observe(step)
            self.recorder.dirty = True

    def close(self) -> None:
        """An engine that has ended, or whose metrics failed, has no series."""
        self.recorder.close()

    def _plain_seconds(self, num_reqs: int) -> float | None:
        """Seconds of a plain step by what the controller has measured; None before it has seen such
        a batch."""
        num_context = sum(request.num_computed_tokens for request in self.scheduler.running)
        cost = self.scheduler.controller.cost
        seconds: float | None = cost.plain_seconds(num_reqs, num_context)
        return seconds

    def samples(self) -> dict[str, list[Any]]:
        """Everything, for a snapshot."""
        found = self.outcomes.samples() | self.times.samples()
        found["controller_steps"] = [
            (list(labels), count) for labels, count in sorted(self.controller.items())
        ]
        found["drafter_info"] = [(self._info, 1)]
        if self.adaptive:
            found |= drafting_samples(status_of(self.scheduler.controller), time.monotonic())
        return found


def _info(vllm_config: Any, block_size: int, adaptive: bool) -> list[str]:
    speculative = vllm_config.speculative_config
    architecture = speculative.draft_model_config.architectures[0]
    return [
        str(speculative.draft_model_config.model),
        architecture,
        str(block_size),
        str(speculative.num_speculative_tokens),
        str(adaptive).lower(),
        __version__,
    ]

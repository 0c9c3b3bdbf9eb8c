"""The worker's side: how much the drafter drafts, how long it takes, and whether it sees the whole
context.

It stands around ``propose`` of a proposer (V1 runner) or a speculator (V2). On a GPU two events of
the device stand around it, which are asked for their times some steps later, so that nothing waits.
Limits: the first rank of tensor parallelism records; coverage is known with the V1 runner only.

    pytest tests/engine/test_metrics.py
"""

import functools
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm_dflash.acceptance import Positions
from vllm_dflash.log import logger
from vllm_dflash.metrics.catalog import BY_NAME
from vllm_dflash.metrics.counts import Histogram, by_position
from vllm_dflash.metrics.recorder import Recorder
from vllm_dflash.serving_drafter import ServingDrafter

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer
    from vllm_dflash.drafting.v2 import DFlashSpeculator


def attach(drafter: "DFlashProposer | DFlashSpeculator", vllm_config: Any, device: Any) -> None:
    """Records what ``drafter.propose`` does; where that fails, says so, and the drafter serves."""
    try:
        parallel = vllm_config.parallel_config
        if parallel.rank % parallel.tensor_parallel_size == 0:
            record = DrafterRecord(drafter, vllm_config, on_gpu=device.type == "cuda")
            drafter.propose = record.watch(drafter.propose)  # type: ignore[method-assign]
    except Exception:  # what watches must not end what serves
        logger.exception("metrics of this drafter: left out; serving goes on")


class DrafterRecord:
    """Counts of one worker's drafter."""

    def __init__(self, drafter: Any, vllm_config: Any, *, on_gpu: bool) -> None:
        self.on_gpu, self._drafter = on_gpu, weakref.ref(drafter)
        self.drafted, self.seconds = (
            Positions(vllm_config.speculative_config.num_speculative_tokens),
            Histogram(BY_NAME["drafter_seconds"].buckets),
        )
        self._running: deque[tuple[Any, Any]] = deque()
        """Pairs of events whose times are not known yet."""
        self._spare: list[tuple[Any, Any]] = []
        self.recorder = Recorder("drafter", vllm_config, self.samples)

    def watch(self, propose: Any) -> Any:
        """Around ``propose``, which returns draft tokens [B, K]."""
        timed = self._timed_by_events if self.on_gpu else self._timed

        @functools.wraps(propose)
        def watching(*args: Any, **kwargs: Any) -> Any:
            no_step = kwargs.get("dummy_run") or getattr(self._drafter(), "is_measured", False)
            return propose(*args, **kwargs) if no_step else timed(propose, args, kwargs)

        return watching

    def _timed(self, propose: Any, args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        drafts = propose(*args, **kwargs)
        seconds = time.perf_counter() - began
        with self.recorder.lock:
            self.seconds.observe(seconds)
            self._drafted(drafts, kwargs)
        return drafts

    def _timed_by_events(self, propose: Any, args: Any, kwargs: Any) -> Any:
        import torch

        begin, end = (
            self._spare.pop()
            if self._spare
            else (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        )
        begin.record()
        drafts = propose(*args, **kwargs)
        end.record()
        self._running.append((begin, end))
        with self.recorder.lock:
            self._collect()
            self._drafted(drafts, kwargs)
        return drafts

    def _drafted(self, drafts: Any, kwargs: Any) -> None:
        """``drafts``: [B, K], a tensor or the V1 proposer's lists; what ``propose`` was called
        with."""
        # On a CPU a step may draft for some of its requests only.
        drafts = [row for row in drafts if row] if isinstance(drafts, list) else drafts
        num_reqs = len(drafts)
        # What the V2 speculator returns is as wide as ever where it has drafted nothing.
        skipped = kwargs.get("num_speculative_tokens") == 0
        self.drafted.add(len(drafts[0]) if num_reqs and not skipped else 0, num_reqs)
        self.recorder.dirty = True

    def _collect(self) -> None:
        """Takes the times of those that the device is done with."""
        while self._running and self._running[0][1].query():
            pair = self._running.popleft()
            self.seconds.observe(pair[0].elapsed_time(pair[1]) / 1000)
            self._spare.append(pair)

    def samples(self) -> dict[str, list[Any]]:
        """Everything, for a snapshot."""
        found: dict[str, list[Any]] = {
            "drafted_tokens": by_position(self.drafted),
            "drafter_seconds": [([], self.seconds.sample())],
        }
        found |= serving_samples(getattr(getattr(self._drafter(), "model", None), "serving", None))
        # The proposer makes it once the page size is known, in its first step.
        drafter = self._drafter() if any(self.seconds.counts) else None
        coverage = drafter and drafter.coverage
        if coverage is not None:
            found["draft_context_positions"] = [
                ([state], count) for state, count in vars(coverage.counts).items()
            ]
        return found


def serving_samples(serving: ServingDrafter | None) -> dict[str, list[Any]]:
    """Which drafter serves, as samples; none before its weights are loaded."""
    if serving is None or not serving.id:
        return {}
    found: dict[str, list[Any]] = {
        "drafter_serving_since_seconds": [([serving.name, serving.id], serving.since)],
        "drafter_swaps": [(["swapped"], serving.swapped), (["refused"], serving.refused)],
    }
    if serving.proof.tau is not None:
        found["drafter_proved_accepted_length"] = [([], serving.proof.tau)]
    return found

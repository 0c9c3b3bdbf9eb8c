"""One vLLM engine that runs closed loops on command; started by ``job.BenchEngine``.

A job pauses when a slice of it is over, and tells of each request that ends. Limits: the engine has
to be in this process (no data parallelism).

    pytest tests/engine/test_bench.py
"""

import copy
import hashlib
import itertools
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.engines.child import Work, serve, start_llm
from vllm_dflash.evaluation.rejection import reject_drafts, rejecting
from vllm_dflash.evaluation.statistics import EARLY_STEPS, DraftCounts, percentile
from vllm_dflash.patches.scheduler_steps import watch
from vllm_dflash.steps import Step

_COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "verified": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "preemptions": "vllm:num_preemptions",
}
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


class Clock:
    """Seconds that an engine works: pauses do not count."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._paused

    def pause_after(self, seconds: float, pause: Callable[[], object]) -> None:
        """Calls ``pause`` where a slice of so many seconds is over; none ever is where they are
        0."""
        began = time.perf_counter()
        if seconds and began - self._began >= seconds:
            pause()
            self._began = time.perf_counter()
            self._paused += self._began - began


@dataclass
class Watch:
    """What the scheduler sees of each step, for one run."""

    clock: Clock
    counts: DraftCounts = field(default_factory=DraftCounts)
    steps: int = 0
    committed: int = 0
    """Output tokens, prompts' first ones included."""
    early: tuple[float, int] | None = None
    """When the first ``EARLY_STEPS`` were over, and the output tokens until then."""
    decoding: bool = False
    """Whether the last step decoded only, with no prompt in it."""

    what: str = "the benchmark's watch"
    is_closed: bool = False
    """No step is counted any more: a figure would be wrong."""

    def close(self) -> None:
        """See ``Observer``."""
        self.is_closed = True

    def reset(self) -> None:
        """Before a run."""
        self.counts, self.steps, self.committed, self.early = DraftCounts(), 0, 0, None

    def observe(self, step: Step) -> None:
        """Counts a step."""
        if not step.scheduled.num_scheduled_tokens:
            return
        self.steps += 1
        self.committed += step.num_committed
        if self.steps == EARLY_STEPS:
            self.early = self.clock.now(), self.committed
        self.decoding = step.all_decode
        if step.is_plain:
            self.counts.observe_plain(step.num_requests, step.num_committed)
        for request_id, (verified, accepted) in step.verified.items():
            self.counts.observe(verified, accepted, step.committed.get(request_id, 0))
        for request_id in step.undrafted:
            self.counts.observe(0, 0, step.committed.get(request_id, 0))


@dataclass
class Request:
    """One request's times, in seconds of the engine's clock, and its output."""

    began: float
    first: float | None = None
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        assert self.first is not None
        return 1000 * (self.first - self.began)

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per output token after the first; None where there is no second."""
        assert self.first is not None
        return (
            1000 * (self.last - self.first) / (len(self.tokens) - 1)
            if len(self.tokens) > 1
            else None
        )


class Engine:
    """An ``LLM`` and the watch over its scheduler."""

    def __init__(self, settings: dict[str, Any]) -> None:
        share, rejects = settings.get("gpu_memory_share"), settings.get("reject_drafts", False)
        args = settings["engine_args"]
        self.llm = start_llm(
            rejecting(args) if rejects else args,
            None if share is None else {"gpu_memory_utilization": share},
        )
        if rejects:
            reject_drafts(self.llm)
        self.clock = Clock()
        self.watch = Watch(self.clock)
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        if not watch(scheduler, self.watch):
            raise RuntimeError("this vLLM's steps cannot be watched: `vllm-dflash status` says why")

    def describe(self) -> dict[str, Any]:
        """What only the engine knows of itself."""
        import torch
        from vllm.platforms import current_platform

        core = self.llm.llm_engine.engine_core.engine_core
        # Where the target is spread over processes, its runner is in none of them here.
        worker = getattr(getattr(core.model_executor, "driver_worker", None), "worker", None)
        drafter = getattr(getattr(worker, "model_runner", None), "drafter", None)
        config = self.llm.llm_engine.vllm_config
        return {
            "device": "CPU" if current_platform.is_cpu() else current_platform.get_device_name(),
            "threads": torch.get_num_threads(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "scheduler": f"{type(core.scheduler).__module__}.{type(core.scheduler).__qualname__}",
            "proposer": (
                None
                if drafter is None
                else f"{type(drafter).__module__}.{type(drafter).__qualname__}"
            ),
        }

    def run(
        self, job: dict[str, Any], done: Callable[[], object], pause: Callable[[], object]
    ) -> dict[str, Any]:
        """Closed loops, one after the other; calls ``done`` as each request ends, and ``pause``
        after each slice."""
        requests: list[Request] = []
        step_ms: list[float] = []
        asked, phases = iter(zip(job["prompts"], job["max_tokens"], strict=True)), []
        before = self._counters()
        self.watch.reset()
        now = self.clock.now
        began = now()
        for phase in job["phases"]:
            phase_began, first, counts = now(), len(requests), copy.copy(self.watch.counts)
            requests += self._loop(
                job,
                phase["concurrency"],
                list(itertools.islice(asked, phase["num_prompts"])),
                step_ms,
                done,
                pause,
            )
            phases.append(
                {
                    "concurrency": phase["concurrency"],
                    "seconds": now() - phase_began,
                    "tokens": sum(len(r.tokens) for r in requests[first:]),
                    "drafts": self.watch.counts.drafts - counts.drafts,
                    "accepted": self.watch.counts.accepted - counts.accepted,
                }
            )
        ended, tokens = self.watch.early or (now(), self.watch.committed)
        early = {"early_tokens_per_second": tokens / (ended - began), "phases": phases}
        return self._result(now() - began, requests, step_ms, before) | early

    def _loop(
        self,
        job: dict[str, Any],
        concurrency: int,
        asked: list[tuple[list[int], int]],
        step_ms: list[float],
        done: Callable[[], object],
        pause: Callable[[], object],
    ) -> list[Request]:
        """So many requests in flight until all are done."""
        engine, clock, waiting = self.llm.llm_engine, self.clock, iter(enumerate(asked))
        requests: dict[str, Request] = {}

        def add() -> None:
            for index, (prompt, max_tokens) in waiting:
                params = _sampling(job, max_tokens)
                requests[str(index)] = Request(clock.now())
                engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
                return

        for _ in range(concurrency):
            add()
        while engine.has_unfinished_requests():
            clock.pause_after(job["slice_seconds"], pause)
            steps, start = self.watch.steps, clock.now()
            outputs = engine.step()
            now = clock.now()
            if self.watch.steps > steps and self.watch.decoding:
                step_ms.append(1000 * (now - start))
            for output in outputs:
                request = requests[output.request_id]
                request.tokens += output.outputs[0].token_ids
                request.last = now
                if request.first is None and request.tokens:
                    request.first = now
                if output.finished:
                    add()
                    done()
        return [requests[str(i)] for i in range(len(requests))]

    def _result(
        self, seconds: float, requests: list[Request], step_ms: list[float], before: dict[str, Any]
    ) -> dict[str, Any]:
        if self.watch.is_closed:
            raise RuntimeError("the steps could not be counted: the log of this engine says why")
        after, counts = self._counters(), self.watch.counts
        counted = {name: after[name] - before[name] for name in _COUNTERS}
        ttft, tpot = (
            [r.ttft_ms for r in requests],
            [r.tpot_ms for r in requests if r.tpot_ms is not None],
        )
        at = [a - b for a, b in zip(after[_PER_POSITION], before[_PER_POSITION], strict=True)]
        counts.accepted_at.reserve(len(at))
        own = counts.accepted_at.counts
        agree = own == at and (counts.drafts, counts.verified, counts.accepted) == tuple(
            counted[n] for n in ("drafts", "verified", "accepted")
        )
        tokens = sum(len(r.tokens) for r in requests)
        return counts.as_dict() | {
            "seconds": seconds,
            "requests": len(requests),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "ttft_p50_ms": percentile(ttft, 0.5),
            "ttft_p95_ms": percentile(ttft, 0.95),
            "tpot_p50_ms": percentile(tpot, 0.5),
            "tpot_p95_ms": percentile(tpot, 0.95),
            "steps": self.watch.steps,
            "step_ms": percentile(step_ms, 0.5),
            "step_p95_ms": percentile(step_ms, 0.95),
            "memory_mib": _peak_memory_mib(),
            "preemptions": counted["preemptions"],
            "agrees_with_vllm": agree,
            "outputs": [
                hashlib.sha256(json.dumps(r.tokens).encode()).hexdigest()[:16] for r in requests
            ],
        }

    def _counters(self) -> dict[str, Any]:
        """vLLM's own, since the engine began; zero where a method has none."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        found: dict[str, Any] = {
            key: int(getattr(metrics.get(name), "value", 0)) for key, name in _COUNTERS.items()
        }
        values = list(getattr(metrics.get(_PER_POSITION), "values", ()))
        return found | {_PER_POSITION: [int(value) for value in values]}


def _sampling(job: dict[str, Any], max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=job["temperature"],
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _peak_memory_mib() -> float:
    """Of this process so far: its resident memory, or on a GPU what torch has reserved there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def begin(settings: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Starts the engine; a job is a ``Job``'s fields."""
    engine = Engine(settings)
    return lambda job, parent: engine.run(job, parent.done, parent.pause), engine.describe()


if __name__ == "__main__":
    serve(begin)

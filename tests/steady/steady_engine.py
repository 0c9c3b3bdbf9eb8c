"""The benchmark's engine under a load that never changes, for ``prove_adaptive.py``: so many
requests decode all the time, and one that ends comes again. What is measured begins when each has
its first token, so no long prompt is in it, and lasts for so many seconds of the engine's clock.

A prompt that came before is in the prefix cache. Put this folder on PYTHONPATH.
"""

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

from vllm_dflash.engines.child import Work, serve
from vllm_dflash.evaluation import engine_child
from vllm_dflash.evaluation.statistics import percentile


class SteadyEngine(engine_child.Engine):
    """An ``Engine`` whose job is a ``Job``'s fields, and besides ``seconds`` and ``undrafted``,
    the requests that say ``{"draft": false}``."""

    def run(
        self, job: dict[str, Any], done: Callable[[], object], pause: Callable[[], object]
    ) -> dict[str, Any]:
        """See the module."""
        engine, clock, count = self.llm.llm_engine, self.clock, len(job["prompts"])
        lanes: dict[str, int] = {}
        numbers = itertools.count()
        started: set[int] = set()
        step_ms: list[float] = []

        def add(lane: int) -> None:
            params = engine_child._sampling(job, job["max_tokens"][lane])
            if lane in job["undrafted"]:
                params.extra_args = {"dflash": {"draft": False}}
            name = f"{lane}-{next(numbers)}"
            lanes[name] = lane
            engine.add_request(name, {"prompt_token_ids": job["prompts"][lane]}, params)

        for lane in range(count):
            add(lane)
        began, tokens, used = None, 0, 0.0
        while began is None or clock.now() - began < job["seconds"]:
            clock.pause_after(job["slice_seconds"], pause)
            start = clock.now()
            for output in engine.step():
                lane = lanes[output.request_id]
                tokens += len(output.outputs[0].token_ids)
                started.add(lane)
                if output.finished:
                    del lanes[output.request_id]
                    add(lane)
            if began is not None and self.watch.decoding:
                step_ms.append(1000 * (clock.now() - start))
            if began is None and len(started) == count:
                self.watch.reset()
                began, tokens, used = clock.now(), 0, time.process_time()
        used = time.process_time() - used
        seconds, counts = clock.now() - began, copy.deepcopy(self.watch.counts)
        engine.abort_request(list(lanes))
        while engine.has_unfinished_requests():
            engine.step()
        for _ in range(count):
            done()
        return counts.as_dict() | {
            "seconds": seconds,
            "tokens_per_cpu_second": tokens / used,
            "requests": count,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "steps": self.watch.steps,
            "step_ms": percentile(step_ms, 0.5),
            "memory_mib": engine_child._peak_memory_mib(),
        }


def begin(settings: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Starts the engine."""
    engine = SteadyEngine(settings)
    return lambda job, parent: engine.run(job, parent.done, parent.pause), engine.describe()


if __name__ == "__main__":
    serve(begin)

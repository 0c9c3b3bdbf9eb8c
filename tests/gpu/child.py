"""An engine of these programs, in a process of its own: does one job after the other.

Started by ``common.Run.engines``; jobs and results are JSON lines (``vllm_dflash.engines.child``).
The V2 runner, on a GPU as vLLM sets it up, or interpreted on a CPU. Nothing here waits for the
device while a step runs: what is recorded is copied on the device and read after the last step.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.engines import counted, counters, model_runner  # noqa: E402
from gpu.pieces import pieces  # noqa: E402
from gpu.watching import Recorder, count_modes, traced, wait_check  # noqa: E402
from vllm_dflash.engines.child import Parent, RefusedError, serve, start_llm  # noqa: E402


class JobError(RuntimeError):
    """A job that this engine cannot do, or not as it was asked for; it is ready for others."""


class Worker:
    """An ``LLM`` and what is watched of it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.llm = start_llm(settings["engine_args"])
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.runner = model_runner(self.llm)
        # On a CPU it is a class of that one.
        if not any(c.__module__.startswith("vllm.v1.worker.gpu.") for c in type(self.runner).mro()):
            raise RefusedError(
                f"this needs the V2 model runner, and vLLM took {_name(self.runner)}"
            )
        self.speculator = getattr(self.runner, "speculator", None)
        self.modes: Counter[str] = Counter()
        """Forwards so far, by whose they are and how they ran."""
        for whose, holder, name in (
            ("target", self.runner, "cudagraph_manager"),
            ("draft", self.speculator, "query_cudagraph_manager"),
        ):
            count_modes(self.modes, whose, getattr(holder, name, None))
        self.recorder = None if self.speculator is None else Recorder(self.speculator)

    def describe(self) -> dict[str, Any]:
        """What an engine says of itself."""
        config = self.engine.vllm_config
        return {
            "seconds": time.perf_counter() - BEGAN,
            "runner": f"{type(self.runner).__module__}.{type(self.runner).__qualname__}",
            "speculator": _name(self.speculator),
            "draft_model": _name(getattr(self.speculator, "model", None)),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "scheduler": _name(self.scheduler),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "max_model_len": config.model_config.max_model_len,
            "compile_seconds": config.compilation_config.compilation_time,
            "wait_check": wait_check(),
            "profile": profile_of(self.scheduler),
        }

    def do(self, job: dict[str, Any], parent: Parent) -> Any:
        """A job's result, by its name; ``error`` where there is none and the engine goes on."""
        jobs: dict[str, Callable[..., Any]] = {
            "drafts": self.drafts,
            "steady": self.steady,
            "profile": self.profile,
            "pieces": lambda **shape: pieces(self.speculator, **shape),
        }
        try:
            return jobs[job.pop("do")](**job)
        except JobError as error:
            return {"error": str(error)}

    def drafts(
        self, prompts: list[list[int]], max_tokens: list[int], requests: int
    ) -> dict[str, Any]:
        """Greedy answers with so many requests in flight, and every draft made for them."""
        if self.recorder is None:
            raise JobError("this engine has no drafter")
        before, modes = counters(self.llm), self.modes.copy()
        self.recorder.begin()
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = iter(range(len(prompts)))

        def add(count: int) -> None:
            for _, index in zip(range(count), waiting):  # in this order none is lost
                self._add(index, prompts[index], max_tokens[index])

        add(requests)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                outputs[int(output.request_id)] += output.outputs[0].token_ids
                add(output.finished)
        return {
            "outputs": outputs,
            "drafts": self.recorder.end(),
            "modes": dict(self.modes - modes),
            **_accepted(counted(before, counters(self.llm))),
        }

    def steady(
        self,
        requests: int,
        context: int,
        acceptance: float | None,
        cold_steps: int,
        steps: int,
        seconds: float,
        tokens: int,
        metrics: bool = True,
    ) -> dict[str, Any]:
        """Speed with ``requests`` in flight all the time, none of them at its prompt or its end.

        Args:
            context: tokens of each prompt.
            acceptance: of each draft token that is reached, where vLLM's synthetic acceptance is
                on.
            cold_steps: at most, before those that are measured; what a controller does not know at
                first shows in them.
            steps: to measure at most.
            seconds: for either of the two, at most.
            tokens: that a request may generate in both, on average.
            metrics: whether our drafter's metrics are on.
        """
        self._accept(acceptance)
        if self.recorder is not None:
            self.recorder.is_bare = not metrics
        with self._in_flight(requests, context):
            cold = self._window(cold_steps, seconds, requests, 0.4 * tokens)
            before, modes = counters(self.llm), self.modes.copy()
            warm = self._window(steps, seconds, requests, 0.6 * tokens)
            after = counted(before, counters(self.llm))
        return (
            warm
            | _accepted(after)
            | {
                "cold_tokens_per_second": cold["tokens_per_second"],
                "preemptions": after.get("preemptions", 0),
                "drafts_a_request_step": after.get("drafts", 0) / (warm["steps"] * requests),
                "modes": dict(self.modes - modes),
            }
        )

    def profile(
        self, requests: int, context: int, warm_steps: int, steps: int, trace: str
    ) -> dict[str, Any]:
        """The speed of ``steps`` steps after ``warm_steps``, and a trace of as many more, in a
        file."""
        parts = (
            (self.scheduler, "schedule"),
            (self.runner, "execute_model"),
            (self.runner, "sample_tokens"),
            (self.speculator, "propose"),
            (self.scheduler, "update_from_output"),
        )
        with self._in_flight(requests, context):
            self._window(warm_steps, 60.0, requests)
            timed = self._window(steps, 60.0, requests)
            traced(self.engine.step, steps, parts, trace)
        return timed

    def _add(self, index: int, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(index), {"prompt_token_ids": prompt}, params)

    @contextmanager
    def _in_flight(self, requests: int, context: int) -> Iterator[None]:
        """So many requests, each past its prompt; gone at the end."""
        import numpy

        config = self.engine.vllm_config.model_config
        ids = numpy.random.default_rng(0).integers(
            2, config.get_vocab_size() - 1, context + requests
        )
        room = config.max_model_len - context
        if room < 1:
            raise JobError(f"a context of {context} leaves no room in {config.max_model_len}")
        for i in range(requests):
            self._add(i, ids[i : i + context].tolist(), room)
        started: set[str] = set()
        try:
            while len(started) < requests:
                if not self.engine.has_unfinished_requests():
                    raise JobError("requests ended before all had begun: shorten the context")
                started |= {o.request_id for o in self.engine.step() if o.outputs[0].token_ids}
            yield
        finally:
            self.engine.abort_request([str(i) for i in range(requests)])
            while self.engine.has_unfinished_requests():
                self.engine.step()

    def _window(
        self, steps: int, seconds: float, requests: int, most_tokens: float = float("inf")
    ) -> dict[str, Any]:
        """So many steps at most, until ``seconds`` are over or a request has ``most_tokens`` more
        on average."""
        took: list[float] = []
        tokens, ended = 0, 0
        began = last = time.perf_counter()
        while len(took) < steps and last - began < seconds and tokens < most_tokens * requests:
            outputs = self.engine.step()
            got = sum(len(o.outputs[0].token_ids) for o in outputs)
            ended += sum(o.finished for o in outputs)
            if ended:
                raise JobError("a request ended while steps were measured: shorten the context")
            if got:  # under asynchronous scheduling the first calls only fill the queue
                now = time.perf_counter()
                took.append(now - last)
                last, tokens = now, tokens + got
        return {
            "steps": len(took),
            "tokens_per_second": tokens / (last - began),
            "step_ms": 1000 * median(took),
            "step_p95_ms": 1000 * quantiles(took, n=20)[-1] if len(took) > 1 else None,
            "tokens_a_request_step": tokens / (len(took) * requests),
        }

    def _accept(self, rate: float | None) -> None:
        """vLLM's synthetic acceptance, of each token that is reached."""
        if rate is None or self.speculator is None:
            return
        rates = getattr(self.runner.rejection_sampler, "synthetic_conditional_rates", None)
        if rates is None:
            raise JobError("this engine was started without vLLM's synthetic acceptance")
        rates.fill_(rate)  # in place: a graph may have its address


def _accepted(delta: dict[str, Any]) -> dict[str, Any]:
    drafts = delta.get("drafts", 0)
    return {"tau": 1 + delta["accepted"] / drafts if drafts else None}


def profile_of(scheduler: Any) -> dict[str, Any] | None:
    """What the warm-up has measured of the engine's steps, seconds by rows; None where drafting is
    not adaptive, or the controller begins with a guess."""
    from dataclasses import asdict

    from vllm_dflash.cost_profile import GUESS

    found = getattr(getattr(scheduler, "controller", None), "profile", GUESS)
    return None if found is GUESS else asdict(found)


def _name(thing: Any) -> str | None:
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


def begin(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Starts the engine."""
    if settings["interpreted"]:
        from engine.v2_interpreter import use_interpreter

        use_interpreter()
    worker = Worker(settings)
    return worker.do, worker.describe()


if __name__ == "__main__":
    serve(begin)

"""Measures an engine's steps at its warm-up under vLLM's V2 runner, as ``measure.py`` does under
V1: whole steps of requests that the runner is handed as vLLM's own warm-up hands it some. So they
have what a request's steps have: sampling, CUDA graphs, attention over pages of the KV cache.

A load is so many requests at a context, which nobody computes: its pages hold what they held. Of
each load three kinds of step are timed. One verifies whole drafts and drafts, one drafts, and one
does neither. The second less the third is the drafter's part, the first less that is the target's
with as many rows. A step is begun while the one before it runs, as under asynchronous scheduling,
and a GPU is asked by events how long they took.

No request of a user's is there yet, and those that are measured leave nothing behind.
Limits: greedy requests alike in length; no step has a prompt.

    pytest tests/engine/test_v2_profile.py tests/unit/test_measure_v2.py
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.warmup import _warmup_block_counter

from vllm_dflash.cost_profile import Cell, fit
from vllm_dflash.drafting.measure import SECONDS, agreed, measure_once, round_numbers
from vllm_dflash.progress import Progress
from vllm_dflash.steps import Work

if TYPE_CHECKING:
    from vllm_dflash.drafting.v2 import DFlashSpeculator

_MOST_ROWS = 1024
"""Of the target and of the drafter, from which on the line goes on."""
_MANY = 16
"""Requests of the load with several long contexts: one alone may keep no whole GPU busy."""
_LONG = 512
"""Positions of the shortest context that is measured."""


class Load(NamedTuple):
    """What is measured together."""

    num_reqs: int
    context: int
    """Positions of each request's."""


def measure(worker: Any) -> None:
    """Measures the steps of a vLLM worker under V2: see ``measure_once``."""
    measure_once(worker.vllm_config, lambda: fit(_cells(worker)))


def _cells(worker: Any) -> Iterator[Cell]:
    config, device = worker.vllm_config, worker.model_runner.device
    until, took = time.monotonic() + SECONDS, 0.0
    with _alone(worker.model_runner, worker.model_runner.speculator, config):
        loads = _loads(worker)
        for load in Progress(loads, desc="measuring steps", unit="load", disable=worker.rank > 0):
            began = time.monotonic()
            if not agreed(config, load == loads[0] or began + took < until):
                break
            yield from _measured(worker, load, *_repeats(device))
            took = time.monotonic() - began


@contextmanager
def _alone(runner: Any, speculator: "DFlashSpeculator", config: Any) -> Iterator[None]:
    """Steps that nobody counts, that no other engine hears of, and after which requests are given
    the seeds that they would have been given."""
    seeds = np.random.get_state()  # of requests that have none of their own
    speculator.is_measured = True
    runner.kv_connector.set_disabled(True)
    try:
        yield
    finally:
        runner.kv_connector.set_disabled(False)
        speculator.is_measured = False
        np.random.set_state(seeds)
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()
        if config.kv_transfer_config is None:  # as vLLM made it; a connector may have filled it
            with torch.inference_mode():
                for cache in runner.kv_caches:
                    cache.zero_()


def _repeats(device: torch.device) -> tuple[int, int]:
    """How often so many steps are timed; a host that computes itself runs none ahead."""
    return (2, 1) if device.type == "cpu" else (3, 3)


def _loads(worker: Any) -> list[Load]:
    """Small ones first: those are sure to be there when time is up, and all others go on from
    them."""
    runner, speculator = worker.model_runner, worker.model_runner.speculator
    block, room = speculator.num_query_per_req, _room(runner)
    most = min(runner.max_num_reqs, runner.max_num_tokens // block, _MOST_ROWS)
    cache = runner.kv_cache_config
    groups = [group.kv_cache_spec for group in cache.kv_cache_groups]
    held = (cache.num_blocks - 1) // len(groups) * min(spec.block_size for spec in groups)
    longest = min(runner.max_model_len, held) - room
    if longest < 0:
        raise ValueError(
            f"requests of {longest + room} tokens are too short for it: {room} are needed"
        )
    many = min(most, _MANY)
    loads = {
        *(Load(num_reqs, 0) for num_reqs in round_numbers(most)),
        *(Load(1, context) for context in (longest // 8, longest) if context >= _LONG),
        *(Load(many, each) for each in [min(longest, held // many - room)] if each >= _LONG),
    }
    return sorted(loads, key=lambda load: load.num_reqs * (1 + 1e-3 * load.context))


def _room(runner: Any) -> int:
    """Positions that a request of a load may come to need beside its context: those of its steps,
    and of the last draft."""
    speculator: DFlashSpeculator = runner.speculator
    rounds, steps = _repeats(runner.device)
    rows = 1 + speculator.num_draft_tokens
    return 1 + (1 + rounds * steps) * (rows + 2) + speculator.num_query_per_req


def _measured(worker: Any, load: Load, rounds: int, steps: int) -> Iterator[Cell]:
    """A load's cells: the target's with a row a request and with whole drafts, and the drafter's,
    unless those are too many rows."""
    runner = worker.model_runner
    speculator: DFlashSpeculator = runner.speculator
    k, block = speculator.num_draft_tokens, speculator.num_query_per_req
    num_reqs, rows = load.num_reqs, load.num_reqs * (1 + k)
    positions = num_reqs * load.context
    whole = drafted = None
    with _requests(worker, load) as step:

        def seconds(verified: int, drafts: int) -> float:
            return _seconds(runner.device, lambda: step(verified, drafts), rounds, steps)

        # In this order: a draft is there to be verified.
        if num_reqs * block <= _MOST_ROWS and num_reqs * (k + block) <= runner.max_num_tokens:
            whole, drafted = seconds(k, k), seconds(0, k)
        plain = seconds(0, 0)
    yield Cell(Work(num_reqs, num_reqs, 0, positions, positions), plain)
    if whole is not None and drafted is not None:
        draft = max(drafted - plain, 1e-6)
        seen = block * positions
        yield Cell(Work(num_reqs, 0, num_reqs * block, positions, 0, seen), draft)
        attended = rows * load.context
        yield Cell(Work(num_reqs, rows, 0, positions, attended), max(whole - draft, 1e-6))


def _seconds(device: torch.device, step: Callable[[], None], rounds: int, steps: int) -> float:
    """Of one step, the lowest of ``rounds`` measurements after a step that is not counted."""
    step()
    found = []
    for _ in range(rounds):
        stop = _clock(device)
        for _ in range(steps):
            step()
        found.append(stop() / steps)
    return min(found)


def _clock(device: torch.device) -> Callable[[], float]:
    """Begins now; says how many seconds the device has run until it is called."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def by_events() -> float:
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return by_events

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    began = now()
    return lambda: now() - began


@contextmanager
def _requests(worker: Any, load: Load) -> Iterator[Callable[[int, int], None]]:
    """A load's requests in the runner, past their prompts, with drafts to be verified; what it
    gives runs a step of all of them, by the draft tokens of each to verify and to draft."""
    runner, (num_reqs, context) = worker.model_runner, load
    names = [f"_vllm_dflash_{i}_" for i in range(num_reqs)]
    vocabulary = runner.model_config.get_vocab_size()
    pages_of, length = _warmup_block_counter(runner), context + _room(runner)
    # Where there are fewer pages than that, requests share some.
    pages = cycle(range(1, runner.kv_cache_config.num_blocks))
    specs = [group.kv_cache_spec for group in runner.kv_cache_config.kv_cache_groups]
    computed = context
    outputs: list[Any] = []

    def new(i: int) -> NewRequestData:
        # Unlike tokens, for which a mixture of experts asks unlike experts.
        prompt = [*[1] * context, (1 + 7919 * i) % vocabulary]
        return NewRequestData(
            req_id=names[i],
            prompt_token_ids=prompt,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=length),
            pooling_params=None,
            block_ids=tuple(list(islice(pages, pages_of(length, spec))) for spec in specs),
            num_computed_tokens=context,
            lora_request=None,
            prefill_token_ids=prompt,
        )

    def run(rows: int, drafts: int, **others: Any) -> None:
        nonlocal computed
        scheduled = replace(
            SchedulerOutput.make_empty(),
            num_scheduled_tokens=dict.fromkeys(names, rows),
            total_num_scheduled_tokens=num_reqs * rows,
            num_spec_tokens_to_schedule=drafts,
            **others,
        )
        worker.execute_model(scheduled)
        outputs.append(worker.sample_tokens(None))
        # At most: the device alone knows how many were accepted.
        computed += rows
        wait(1)

    def wait(running: int) -> None:
        """Until no more steps run: the buffers by which a runner hands on its inputs are two."""
        while len(outputs) > running:
            output = outputs.pop(0)
            if isinstance(output, AsyncModelRunnerOutput):
                output.get_output()

    def step(verified: int, drafts: int) -> None:
        cached = replace(
            CachedRequestData.make_empty(),
            req_ids=names,
            num_computed_tokens=[computed] * num_reqs,
            num_output_tokens=[1] * num_reqs,
            new_block_ids=[None] * num_reqs,
        )
        scheduled = {name: [0] * verified for name in names} if verified else {}
        run(
            1 + verified,
            drafts,
            scheduled_cached_reqs=cached,
            scheduled_spec_decode_tokens=scheduled,
        )

    try:
        first = [new(i) for i in range(num_reqs)]
        run(1, runner.speculator.num_draft_tokens, scheduled_new_reqs=first)
        yield step
        wait(0)
    finally:
        worker.execute_model(replace(SchedulerOutput.make_empty(), finished_req_ids=set(names)))

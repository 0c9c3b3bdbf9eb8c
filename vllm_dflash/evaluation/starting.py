"""Starts the engines of a benchmark, or reaches the server that takes their place.

pytest tests/engine/test_bench.py
"""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_dflash.engines.process import EngineFailedError
from vllm_dflash.evaluation.job import BenchEngine, Engine
from vllm_dflash.evaluation.methods import FIXED, Method
from vllm_dflash.evaluation.plan import Plan
from vllm_dflash.progress import Progress

_GPU_MEMORY = 0.9
"""Of the device, for all engines together."""


def start_engines(
    plan: Plan,
    logs: Path,
    stack: ExitStack,
    described: dict[str, dict[str, Any]],
    failures: dict[str, EngineFailedError],
) -> dict[str, Engine]:
    """The engines that started, by method; fills in what they say of themselves, and why others did
    not start."""
    if plan.server is not None:
        described[plan.methods[0].name] = {"device": plan.server_url}
        return {plan.methods[0].name: plan.server}
    logs.mkdir(exist_ok=True)
    engines: dict[str, Engine] = {}
    with Progress(_launched(plan, logs, stack), total=len(plan.methods), unit=" engines") as bar:
        for method, engine in bar:
            bar.set_description(f"starting {method.name}")
            try:
                if isinstance(engine, EngineFailedError):
                    raise engine
                described[method.name] = engine.wait_until_ready()
                engines[method.name] = engine
            except EngineFailedError as error:
                failures[method.name] = error
                where = f"\n{error.tail}\n(its log: {_log(logs, method)})" if error.tail else ""
                bar.write(f"{method.name} did not start: {error}{where}")
    return engines


def _launched(
    plan: Plan, logs: Path, stack: ExitStack
) -> Iterator[tuple[Method, BenchEngine | EngineFailedError]]:
    """Each method's engine, begun but not ready, or why there is none.

    The next one begins when the caller is done with the last: vLLM measures free memory while it
    starts. Where ``kv_cache_memory_bytes`` says what there is to have, one more for each further
    core begins ahead.
    """
    at_once = len(os.sched_getaffinity(0)) if plan.engine_args.get("kv_cache_memory_bytes") else 1
    begun: deque[tuple[Method, BenchEngine | EngineFailedError]] = deque()
    for method in plan.methods:
        refusal = _refusal(method)
        if refusal is None:
            engine = BenchEngine(
                engine_settings(plan, method), method.environment, _log(logs, method)
            )
            begun.append((method, stack.enter_context(engine)))
        else:
            begun.append((method, refusal))
        if len(begun) == at_once:
            yield begun.popleft()
    yield from begun


def _log(logs: Path, method: Method) -> Path:
    return logs / (method.name.replace(":", "-").replace("@", "-") + ".log")


def engine_settings(plan: Plan, method: Method) -> dict[str, Any]:
    """What the child is told; the same for all methods, but for what makes the method."""
    own = method.engine_args
    given = plan.engine_args.get("additional_config") or {}
    if "additional_config" in own and given:
        own = own | {"additional_config": given | own["additional_config"]}
    if plan.spec_args and "speculative_config" in own:
        own = own | {"speculative_config": own["speculative_config"] | plan.spec_args}
    args = {
        "model": plan.target,
        "dtype": plan.dtype,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": max(p.concurrency for p in plan.points),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
    }
    return {
        "engine_args": {**args, **plan.engine_args, **own},
        "gpu_memory_share": round(_GPU_MEMORY / len(plan.methods), 3),
        "reject_drafts": plan.break_even and method.kind == FIXED,
    }


def _refusal(method: Method) -> EngineFailedError | None:
    """What is known before vLLM is imported."""
    if method.kind == "suffix" and find_spec("arctic_inference") is None:
        return EngineFailedError(
            "arctic-inference is not installed: pip install arctic-inference==0.1.1"
        )
    return None

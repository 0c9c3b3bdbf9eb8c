"""One plain vLLM engine that answers shards of prompts; started by ``generate``, whose end it does not outlive.

python -m vllm_dflash.training.generate_engine ORDER.json       with its standard input left open
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dflash.training.files import TrainingError
from vllm_dflash.training.sequences import write_sequences

_CPU_CACHE_BYTES = 1 << 30


def start(engine_args: dict[str, Any]) -> Any:
    """An ``LLM``."""
    from vllm import LLM
    from vllm.platforms import current_platform

    # Without it, the CPU's cache takes a share of the machine's memory, which other work may need.
    cpu = {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True} if current_platform.is_cpu() else {}
    return LLM(**cpu | engine_args)


def main(order: dict[str, Any]) -> None:
    """Does each job, and prints ``done N`` for its N prompts."""
    llm = start(order["engine_args"])
    for job in order["jobs"]:
        print(f"done {answer(llm, job)}", flush=True)


def answer(llm: Any, job: dict[str, Any]) -> int:
    """Answers a job's prompts and writes its shard; how many prompts it had."""
    from vllm import SamplingParams

    config = llm.llm_engine.model_config
    eos = config.try_get_generation_config().get("eos_token_id", getattr(config.hf_text_config, "eos_token_id", None))
    sampling = job["sampling"] | {"ignore_eos": True, "detokenize": False}
    if not job["sampling"]["ignore_eos"]:
        sampling["stop_token_ids"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
    params = [SamplingParams(**sampling, seed=job["seed"] + i if sampling["temperature"] else None) for i in range(len(job["prompts"]))]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
    answers = [([*ids, *out.outputs[0].token_ids], len(ids)) for ids, out in zip(job["prompts"], outputs, strict=True)]
    write_sequences(Path(job["path"]), [*((tokens, n) for tokens, n in job["answered"]), *answers])
    return len(answers)


def run_as_child(work: Callable[[dict[str, Any]], None]) -> None:
    """``work`` on the order whose file the command line names; a refusal is printed as ``refused ...``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except TrainingError as refusal:
        print(f"refused {refusal}", flush=True)
        sys.exit(1)


def _end_with_parent() -> None:
    """The parent holds the other end of standard input: it closes when the parent ends, however it ends."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    run_as_child(main)

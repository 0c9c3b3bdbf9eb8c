"""One plain vLLM engine that answers shards of prompts; started by ``generate``, whose end it does
not outlive.

pytest tests/engine/test_train.py
"""

from pathlib import Path
from typing import Any

from vllm_dflash.engines.child import Parent, Work, generate, serve, start_llm
from vllm_dflash.training.sequences import write_sequences


def begin(engine_args: dict[str, Any]) -> tuple[Work, None]:
    """Starts the engine; a job is a shard."""
    llm = start_llm(engine_args)
    return lambda job, parent: answer(llm, job, parent), None


def answer(llm: Any, job: dict[str, Any], parent: Parent | None = None) -> int:
    """Answers a job's prompts and writes its shard; how many prompts it had."""
    from vllm import SamplingParams

    config = llm.llm_engine.model_config
    eos = config.try_get_generation_config().get(
        "eos_token_id", getattr(config.hf_text_config, "eos_token_id", None)
    )
    sampling = job["sampling"] | {"ignore_eos": True, "detokenize": False}
    if not job["sampling"]["ignore_eos"]:
        sampling["stop_token_ids"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
    params = [
        SamplingParams(**sampling, seed=job["seed"] + i if sampling["temperature"] else None)
        for i in range(len(job["prompts"]))
    ]
    outputs = generate(llm, job["prompts"], params, parent)
    answers = [
        ([*ids, *out.outputs[0].token_ids], len(ids))
        for ids, out in zip(job["prompts"], outputs, strict=True)
    ]
    write_sequences(Path(job["path"]), [*((tokens, n) for tokens, n in job["answered"]), *answers])
    return len(answers)


if __name__ == "__main__":
    serve(begin)

"""Two data-parallel ranks on Ray's backend, driven by AsyncLLM. Run by
``test_cluster_tensor_parallel.py``: OUT TOKENS."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

from engine.harness import DRAFTER, TARGET, held_out_prompts  # noqa: E402
from vllm_dflash.cluster.settings import EngineSettings, engine_args  # noqa: E402

MORE = {
    "kv_cache_memory_bytes": 1 << 27,
    "enforce_eager": True,
    "data_parallel_size": 2,
    "data_parallel_backend": "ray",
    "distributed_executor_backend": "ray",
}


async def main(out: Path, tokens: int) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = EngineSettings(
        str(TARGET), str(DRAFTER), "cuda", 7, dtype="float32", max_model_len=512, engine_args=MORE
    )
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(settings)))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def ask(number: int, ids: list[int]) -> Any:
        stream = engine.generate(
            {"prompt_token_ids": ids}, params, str(number), data_parallel_rank=number % 2
        )
        return [answer async for answer in stream][-1]

    answers = await asyncio.gather(
        *(ask(number, ids) for number, ids in enumerate(held_out_prompts(8)))
    )
    report = {
        "texts": [answer.outputs[0].text for answer in answers],
        "tokens_by_rank": _tokens_by_rank(),
    }
    out.write_text(json.dumps(report))
    engine.shutdown()


def _tokens_by_rank() -> dict[str, float]:
    """vLLM's own count of generated tokens."""
    from prometheus_client import REGISTRY

    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return {
        sample.labels["engine"]: sample.value
        for sample in samples
        if sample.name == "vllm:generation_tokens_total"
    }


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))

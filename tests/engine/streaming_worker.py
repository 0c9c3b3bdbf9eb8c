"""Streaming-input sessions on ``AsyncLLM``. Driven by ``test_streaming_sessions.py``: each job is
an engine and batches of sessions."""

import asyncio
import gc
from typing import Any

from engines import SETTINGS, answer_jobs


async def session(llm: Any, name: str, job: dict[str, Any]) -> list[int]:
    """All tokens of a session: each input comes when the output to the one before has ended."""
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    ended, tokens = asyncio.Event(), []
    each = [
        SamplingParams(**job["params"], **more, output_kind=RequestOutputKind.DELTA)
        for more in job.get("each", [{}] * len(job["prompts"]))
    ]

    async def inputs() -> Any:
        for prompt, params in zip(job["prompts"], each, strict=True):
            yield StreamingInput({"prompt_token_ids": list(prompt)}, params)
            await ended.wait()
            ended.clear()

    wanted = 0
    async for output in llm.generate(inputs(), each[0], name):
        tokens += output.outputs[0].token_ids
        if len(tokens) - wanted >= job["params"]["max_tokens"]:
            wanted = len(tokens)
            ended.set()
    return tokens


async def answer(job: dict[str, Any]) -> list[list[list[int]]]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = {name: value for name, value in SETTINGS.items() if name != "disable_log_stats"} | job[
        "args"
    ]
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
    try:
        return [
            await asyncio.gather(
                *(session(llm, f"{batch}-{i}", each) for i, each in enumerate(sessions))
            )
            for batch, sessions in enumerate(job["batches"])
        ]
    finally:
        llm.shutdown()
        gc.collect()


def run(job: dict[str, Any]) -> list[list[list[int]]]:
    return asyncio.run(answer(job))


if __name__ == "__main__":
    answer_jobs(run)

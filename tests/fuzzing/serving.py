"""One engine after the other in a process of its own, driven by lines of JSON:
``fuzz_differential.py`` has the other end.

A line on standard input starts an engine or hands it a round of requests; the answer is a line in
the file named on the command line.
"""

import asyncio
import gc
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "seed": 0,
    "kv_cache_memory_bytes": 1 << 27,
    "disable_log_stats": False,
    "generation_config": "vllm",
    "max_logprobs": -1,
}
STEP = 0.003
"""Seconds of ``AsyncLLM`` for a step of ``LLM``."""
SILENCE = 30.0
"""Seconds without an output after which a round is given up. Not steps: while a first grammar is
compiled, a busy machine makes tens of thousands of empty ones."""
COUNTERS = (
    "num_preemptions",
    "spec_decode_num_drafts",
    "spec_decode_num_accepted_tokens",
    "prefix_cache_hits",
)


def sampling_params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    fields = dict(request["params"])
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "repetition_detection" in fields:
        fields["repetition_detection"] = RepetitionDetectionParams(**fields["repetition_detection"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    kinds = {
        "final": RequestOutputKind.FINAL_ONLY,
        "cumulative": RequestOutputKind.CUMULATIVE,
        "delta": RequestOutputKind.DELTA,
    }
    return SamplingParams(**fields, output_kind=kinds[request.get("stream", "final")])


class Prompts:
    """What ``add_request`` and ``generate`` take of a request beside its sampling parameters.
    ``target``: where embeddings of prompts come from; ``adapters``: LoRAs, the first is number 1.
    """

    def __init__(self, target: str, adapters: Sequence[str]) -> None:
        self._target, self._adapters = Path(target), adapters

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm import TextPrompt, TokensPrompt
        from vllm.lora.request import LoRARequest

        found: dict[str, Any] = {
            "prompt": TokensPrompt(prompt_token_ids=request["prompt"]),
            "priority": request.get("priority", 0),
        }
        if self._adapters and request.get("lora"):
            number = int(request["lora"])
            found["lora_request"] = LoRARequest(
                f"adapter {number}", number, self._adapters[number - 1]
            )
        if "text" in request:
            found["prompt"] = TextPrompt(prompt=request["text"])
            found["tokenization_kwargs"] = {
                "truncate_prompt_tokens": request["truncate_prompt_tokens"]
            }
        elif "embeds" in request:
            found["prompt"] = self._embeds(request["prompt"], *request["embeds"])
        if "cache_salt" in request:
            found["prompt"]["cache_salt"] = request["cache_salt"]
        return found

    def _embeds(self, tokens: list[int], start: int, end: int) -> Any:
        """The tokens' own embeddings, the others of the prompt as tokens."""
        from vllm.inputs import EmbedsPrompt

        found = EmbedsPrompt(prompt_embeds=self._table[tokens])
        are_tokens = [not start <= i < end for i in range(len(tokens))]
        if any(are_tokens):
            found |= {"prompt_token_ids": tokens, "prompt_is_token_ids": are_tokens}
        return found

    @cached_property
    def _table(self) -> Any:
        from safetensors import safe_open

        with safe_open(self._target / "model.safetensors", "pt") as file:
            return file.get_tensor("model.embed_tokens.weight").float()


class Answers:
    """What came back, by request: completions by index, put together from whatever was streamed."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self._stream = {r["id"]: r.get("stream", "final") for r in requests}
        self.found: dict[int, dict[str, Any]] = {}

    def refuse(self, request_id: int, error: Exception) -> None:
        self.found[request_id] = {"error": f"{type(error).__name__}: {error}"[:500]}

    def take(self, request_id: int, output: Any) -> None:
        found = self.found.setdefault(request_id, {"completions": {}, "finished": False})
        found["finished"] |= output.finished
        if output.prompt_token_ids is not None:
            found["num_prompt_tokens"] = len(output.prompt_token_ids)
        if output.prompt_logprobs:  # in a stream of deltas only the first has them
            found["prompt_logprobs"] = [_step(step) for step in output.prompt_logprobs]
        for completion in output.outputs:
            new = {
                "token_ids": list(completion.token_ids),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "cumulative_logprob": completion.cumulative_logprob,
                "logprobs": (
                    None
                    if completion.logprobs is None
                    else [_step(step) for step in completion.logprobs]
                ),
            }
            old = found["completions"].get(completion.index)
            if old is not None and self._stream[request_id] == "delta":
                for name in ("token_ids", "text", "logprobs"):
                    new[name] = (
                        old[name]
                        if new[name] is None
                        else new[name]
                        if old[name] is None
                        else old[name] + new[name]
                    )
            found["completions"][completion.index] = new


def _step(step: Any) -> dict[int, tuple[float, int | None, str | None]] | None:
    """One position's log-probabilities by token, each with its rank and its text; what is
    impossible is left out."""
    return step and {
        t: (v.logprob, v.rank, v.decoded_token) for t, v in step.items() if v.logprob > -1e30
    }


def run_round(
    llm: Any, requests: list[dict[str, Any]], prompt: Prompts, resets: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """All of the requests, each arriving and maybe aborted at its engine step; in steps of
    ``resets`` the prefix cache is dropped, and what runs begins again."""
    from vllm.exceptions import VLLMValidationError

    engine, answers, step, last = llm.llm_engine, Answers(requests), 0, time.monotonic()
    waiting, aborts = sorted(requests, key=lambda r: r["arrives"]), {}
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["arrives"] <= step:
            request = waiting.pop(0)
            try:
                engine.add_request(
                    str(request["id"]), params=sampling_params(request), **prompt(request)
                )
            except (ValueError, VLLMValidationError) as refusal:
                answers.refuse(request["id"], refusal)
                # What the engine's core refused is still counted by vLLM's front.
                engine.abort_request([str(request["id"])])
                continue
            if "aborted_after" in request:
                aborts[request["id"]] = step + request["aborted_after"]
        for request_id in [i for i, at in aborts.items() if at <= step]:
            engine.abort_request([str(request_id)])
            del aborts[request_id]
        if step in resets:
            engine.reset_prefix_cache(reset_running_requests=True)
        # Of an engine core in its own process a step without requests would wait for ever.
        outputs = engine.step() if engine.has_unfinished_requests() else []
        for output in outputs:
            answers.take(int(output.request_id), output)
        step += 1
        if outputs:
            last = time.monotonic()
        elif not waiting:
            time.sleep(0.001)  # for a thread that compiles a grammar
        assert time.monotonic() < last + SILENCE, (
            "never done:"
            f" {[r['id'] for r in requests if not answers.found.get(r['id'], {}).get('finished')]}"
        )
    return answers.found


async def run_round_async(
    llm: Any, requests: list[dict[str, Any]], prompt: Prompts, resets: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """The same on ``AsyncLLM``: arrivals by the clock, and an aborted request's client hangs up
    after so many outputs."""
    from vllm.exceptions import VLLMValidationError

    answers = Answers(requests)

    async def ask(request: dict[str, Any]) -> None:
        await asyncio.sleep(request["arrives"] * STEP)
        seen = 0
        try:
            given = prompt(request)
            stream = llm.generate(
                given.pop("prompt"),
                sampling_params(request),
                f"{request['id']}-{random.random()}",
                **given,
            )
            async for output in stream:
                answers.take(request["id"], output)
                seen += 1
                if seen > request.get("aborted_after", 1 << 30):
                    break
        except (ValueError, VLLMValidationError) as refusal:
            answers.refuse(request["id"], refusal)

    async def reset(step: int) -> None:
        await asyncio.sleep(step * STEP)
        await llm.reset_prefix_cache(reset_running_requests=True)

    await asyncio.wait_for(asyncio.gather(*map(ask, requests), *map(reset, resets)), 240)
    return answers.found


def draft_at_random(seed: int) -> None:
    """The controller's choices by dice: whether a step drafts, and how much of each draft is
    verified."""
    from vllm_dflash.adaptive.controller import Controller, Plan

    rng = random.Random(seed)

    def lengths(
        self: Any, requests: Sequence[str], plan: Any, confidences: Any = None
    ) -> dict[str, int]:
        return {
            r: rng.choice([0, 1, self.max_draft, rng.randint(0, self.max_draft)]) for r in requests
        }

    Controller.kept_plan = lambda self, num_reqs: None  # type: ignore[method-assign]
    Controller.plan = lambda self, requests: Plan(self.max_draft if rng.random() < 0.75 else 0)  # type: ignore[method-assign]
    Controller.lengths = lengths  # type: ignore[method-assign]


@contextmanager
def noise_on_logits(llm: Any, size: float) -> Iterator[None]:
    """Adds up to ``size`` to each of the target's logits: what plain decoding writes then was
    within so much of being written."""
    if not size:
        yield
        return
    import torch

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    model = executor.driver_worker.worker.model_runner.model
    original, generator = model.compute_logits, torch.Generator().manual_seed(0)

    def noisy(*args: Any, **kwargs: Any) -> Any:
        logits = original(*args, **kwargs)
        return logits + size * (2 * torch.rand(logits.shape, generator=generator) - 1)

    model.compute_logits = noisy
    try:
        yield
    finally:
        model.compute_logits = original


class Server:
    """The engine that runs now."""

    def __init__(self) -> None:
        from vllm_dflash.adaptive.controller import Controller

        self.llm: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._counters: dict[str, float] = {}
        self.prompt, self.resets = Prompts("", ()), list[int]()
        self.own_process = False
        self._fault = ExitStack()
        self._controller = {
            name: vars(Controller)[name] for name in ("kept_plan", "plan", "lengths")
        }

    def start(
        self,
        args: dict[str, Any],
        asynchronous: bool = False,
        plan_seed: int | None = None,
        adapters: Sequence[str] = (),
        fault: str | None = None,
        own_process: bool = False,
        resets: Sequence[int] = (),
    ) -> dict[str, Any]:
        """``adapters``: LoRAs of the requests that want one. ``fault``: a key of
        ``broken_rules.RULES``, to see whether it is found. ``own_process``: of the engine core."""
        from vllm import LLM, AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from vllm_dflash.adaptive.controller import Controller

        self.stop()
        self.prompt, self.resets = Prompts(args["model"], adapters), list(resets)
        self.own_process = own_process
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
        for name, method in self._controller.items():
            setattr(Controller, name, method)
        if plan_seed is not None:
            draft_at_random(plan_seed)
        if asynchronous:
            self.loop = asyncio.new_event_loop()

            async def start() -> Any:
                return AsyncLLM.from_engine_args(AsyncEngineArgs(**SETTINGS | args))

            self.llm = self.loop.run_until_complete(start())
        else:
            self.llm = LLM(**SETTINGS | args)
            if fault:
                from engine.broken_rules import RULES

                self._fault.enter_context(RULES[fault](self.llm))
        return {}

    def run(self, requests: list[dict[str, Any]], noise: float = 0.0) -> dict[str, Any]:
        if self.loop is not None:
            return {
                "answers": self.loop.run_until_complete(
                    run_round_async(self.llm, requests, self.prompt, self.resets)
                ),
                "counters": {},
            }
        with noise_on_logits(self.llm, noise):
            answers = run_round(self.llm, requests, self.prompt, self.resets)
        metrics = {m.name: getattr(m, "value", 0) for m in self.llm.get_metrics()}
        counters = {name: metrics.get(f"vllm:{name}", 0) for name in COUNTERS}
        before, self._counters = self._counters, counters
        return {
            "answers": answers,
            "counters": {name: value - before.get(name, 0) for name, value in counters.items()},
        }

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.tokenizers import cached_get_tokenizer

        self._fault.close()
        if self.loop is not None:
            if self.llm is not None:
                self.llm.shutdown()
            self.loop.run_until_complete(asyncio.sleep(0.1))
            self.loop.close()
        elif self.own_process and self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm, self.loop, self._counters = None, None, {}
        # vLLM adds a token to its one tokenizer for an engine that takes prompt embeddings.
        cached_get_tokenizer.cache_clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    from engine.engines import keep_frozen

    keep_frozen()
    server = Server()
    with open(sys.argv[1], "w", buffering=1) as out:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = getattr(server, asked.pop("do"))(**asked)
            except Exception:
                answer = {"crash": traceback.format_exc()[-4000:]}
            print(json.dumps(answer), file=out)
    server.stop()


if __name__ == "__main__":
    main()

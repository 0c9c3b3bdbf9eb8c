"""An engine whose model is touched between requests. Driven by ``test_apply_model.py``: each job is
an engine; what it answers, before, under and after each touch."""

from collections.abc import Callable
from typing import Any

from engines import answer_jobs, start


def touches() -> list[Callable[[Any], Any]]:
    """In turn; made here, so that they travel to another process by value."""

    def hook(model: Any) -> bool:
        """Quieter attention in the second layer; returns whether its process counts calls."""
        from vllm_dflash.client_calls import CALLS

        part = model.model.layers[1].self_attn
        part.kept = part.register_forward_hook(lambda _module, _args, out: out * 0.5)
        return CALLS.are_counted

    def unhook(model: Any) -> None:
        model.model.layers[1].self_attn.kept.remove()

    def method(model: Any) -> None:
        part = model.model.layers[2].mlp
        part.forward = lambda x: type(part).forward(part, x) * 0.5

    def unset(model: Any) -> None:
        del model.model.layers[2].mlp.forward

    return [hook, unhook, method, unset]


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = start(job["model"], **job["args"])
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def answer() -> list[list[int]]:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.reset_prefix_cache()
        return [list(output.outputs[0].token_ids) for output in outputs]

    tokens, counted = [answer()], False
    for touch in touches():
        (said,) = llm.apply_model(touch)
        counted = counted or bool(said)
        tokens.append(answer())
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "counted": counted}


if __name__ == "__main__":
    answer_jobs(run)

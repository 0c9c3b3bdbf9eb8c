"""An engine whose model is touched between requests. Driven by ``test_apply_model.py``: each job is
an engine; what it answers, before, under and after each touch."""

import tempfile
import time
from pathlib import Path
from typing import Any

import touches
from engines import answer_jobs, start


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = start(job["model"], **job["args"])
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def answer() -> list[list[int]]:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.reset_prefix_cache()
        return [list(output.outputs[0].token_ids) for output in outputs]

    tokens = {"untouched": answer()}
    (settled,) = llm.apply_model(touches.hook)
    for name, touch in (
        ("hooked", None),
        ("unhooked", touches.unhook),
        ("another method", touches.method),
        ("its own method", touches.unset),
    ):
        if touch is not None:
            llm.apply_model(touch)
        tokens[name] = answer()
    with tempfile.TemporaryDirectory() as folder:
        llm.collective_rpc(touches.hook_when_told, args=(folder,))
        tokens["a thread waits"] = answer()
        Path(folder, "told").touch()
        while not Path(folder, "done").exists():
            time.sleep(0.01)
    tokens["it has set a hook"] = answer()
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "settled": settled}


if __name__ == "__main__":
    answer_jobs(run)

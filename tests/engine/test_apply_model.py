"""``LLM.apply_model`` and ``collective_rpc`` on a running engine: what they do to the target is
heeded at the next forward, in the caller's process and in one of the worker's own.

pytest tests/engine/test_apply_model.py
"""

from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_worker

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("own_process", [False, True])
def test_what_a_call_does_to_the_target_is_heeded_at_once(own_process: bool) -> None:
    """In a process of its own the fast layers look at the modules once, until such a call comes;
    from then on at each forward, as a call may leave a thread behind."""
    prompts = [prompt[:40] for prompt in held_out_prompts(2)]
    speculative = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
    settings: list[dict[str, Any]] = [
        {},
        {"speculative_config": speculative, "additional_config": {"dflash": {"adaptive": False}}},
    ]
    plain, ours = run_worker(
        "apply_model_worker.py",
        [{"model": str(TARGET), "args": args, "prompts": prompts} for args in settings],
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            # The tests' own plug-in is another's code.
            "VLLM_PLUGINS": "dflash",
        },
    )
    assert ours["settled"] == own_process
    assert ours["tokens"] == plain["tokens"]
    untouched, hooked, *others = plain["tokens"].values()
    assert hooked != untouched
    assert [tokens == untouched for tokens in others] == [True, False, True, True, False]
    assert plain["tokens"]["it has set a hook"] == hooked

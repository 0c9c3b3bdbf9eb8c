"""Prompts that are given as embeddings, without token ids, beside drafts.

pytest tests/engine/test_prompt_embeds.py
"""

import pytest

from engine.harness import DRAFTER, TARGET, Job, held_out_prompts, run_engines

pytestmark = pytest.mark.engine


def test_embeddings_in_chunks() -> None:
    """They ended the engine: vLLM's V1 proposer looks up the last token of each prompt that is not
    at its end, and of embeddings there is none."""
    prompts = held_out_prompts(4)
    prompts[0] = [token for prompt in prompts for token in prompt][:150]
    in_chunks = {
        "enable_prompt_embeds": True,
        "long_prefill_token_threshold": 40,
        "enable_prefix_caching": False,
    }
    (plain,), (drafted,) = run_engines(
        [
            Job(TARGET, None, prompts, max_tokens=40),
            Job(TARGET, DRAFTER, prompts, max_tokens=40, as_embeddings=True, engine_args=in_chunks),
        ]
    )
    assert drafted.tokens == plain.tokens
    assert drafted.tau > 1.5

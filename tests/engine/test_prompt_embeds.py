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
            Job(
                TARGET,
                DRAFTER,
                prompts,
                max_tokens=40,
                as_embeddings=[True] * len(prompts),
                engine_args=in_chunks,
            ),
        ]
    )
    assert drafted.tokens == plain.tokens
    assert drafted.tau > 1.5


def test_penalties_after_a_request_that_was_padded() -> None:
    """They ended the engine: of a prompt that is embeddings throughout vLLM's penalties read the
    tokens that its row had before, and a prompt of one token that comes while others decode is
    padded with -1, one for each draft. vLLM's n-gram ends so too."""
    text = held_out_prompts(1)[0]
    settings = {
        # The second makes way for the third, and that for the fourth, while the first decodes.
        "prompts": [text[:30], [260], [260], text[:20]],
        "max_tokens": [60, 1, 1, 8],
        "as_embeddings": [False, False, False, True],
        "engine_args": {"enable_prompt_embeds": True, "max_num_seqs": 2},
        "sampling": {"presence_penalty": 0.5},
    }
    (plain,), (drafted,) = run_engines(
        [Job(TARGET, None, **settings), Job(TARGET, DRAFTER, **settings)]
    )
    assert drafted.tokens == plain.tokens

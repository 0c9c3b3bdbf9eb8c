"""Streaming-input sessions (``AsyncLLM`` with an async generator of ``StreamingInput``): output
equals plain decoding's.

pytest -s tests/engine/test_streaming_sessions.py
"""

from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_sessions_go_on_as_without_drafts() -> None:
    """Alone and four at a time, three inputs a session.

    Under synchronous scheduling vLLM left drafts that were accepted past an output's end counted as
    computed. The session's next input then kept the last output token, which plain decoding drops,
    and took the cache of the dropped drafts for its own first tokens': other text from there on,
    with vLLM's own dflash too. ``patches/streaming_sessions.py`` has the cure.

    With seeds: the session keeps its generator, also where an input has a seed of its own, and our
    draws began anew with each input. ``patches/v1_session_seeds.py`` has the cure.
    """
    prompts = [prompt[:40] for prompt in held_out_prompts(12)]
    sessions = [
        {
            "prompts": prompts[3 * i : 3 * i + 3],
            "params": {"max_tokens": 10 + i, "ignore_eos": True, "temperature": 0.0},
        }
        for i in range(4)
    ]
    seeded = [
        session
        | {"params": session["params"] | {"temperature": 0.8}, "each": [{"seed": s} for s in seeds]}
        for session, seeds in zip(sessions, ([11] * 3, [11, 12, 13]) * 2, strict=True)
    ]
    args: dict[str, Any] = {
        "model": str(TARGET),
        "additional_config": {"dflash": {"adaptive": False}},
    }
    speculative = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
    jobs = [
        {"args": args | more, "batches": [sessions[:1], sessions, seeded]}
        for more in ({}, {"speculative_config": speculative})
    ]
    plain, ours = run_worker("streaming_worker.py", jobs, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert [[len(tokens) for tokens in batch] for batch in plain[1:]] == [[30, 33, 36, 39]] * 2
    assert plain[2] != plain[1]
    assert ours == plain

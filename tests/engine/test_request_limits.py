"""Requests that say how much may be drafted for them, in real engines, with the controller and
without: the output is plain decoding's, and no more is verified than they allow.

    pytest tests/engine/test_request_limits.py
"""

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts
from engine.sampling_harness import Answer, Ask, Engine, run

pytestmark = pytest.mark.engine
COUNT, K = 8, 7
GREEDY = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}
OFF, SOME = ({"extra_args": {"dflash": said}} for said in ({"draft": False}, {"max_draft": 3}))
ALL_OFF, ALL_SOME, MIXED, REFUSED, AFTER = range(5)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Answer]]:
    """Batches of requests that want no drafts, at most three, and both beside some that say
    nothing and one with a seed; a malformed one, and the first again after it."""
    prompts = held_out_prompts(COUNT)
    mixed = [GREEDY | (OFF, SOME, {})[i % 3] for i in range(COUNT)]
    mixed[-1] = mixed[-1] | OFF | {"temperature": 1.0, "seed": 3}
    asks = [Ask(prompts, GREEDY | OFF), Ask(prompts, GREEDY | SOME), Ask(prompts, mixed)]
    malformed = Ask(prompts[:1], GREEDY | {"extra_args": {"dflash": {"max_draft": K + 1}}})
    engines = [
        Engine(TARGET, DRAFTER, [*asks, malformed, asks[MIXED]], args=_adaptive(on))
        for on in (False, True)
    ]
    plain, whole, adaptive = run([Engine(TARGET, None, asks), *engines])
    return {"plain": plain, "whole": whole, "adaptive": adaptive}


def _adaptive(on: bool) -> dict[str, dict[str, dict[str, bool]]]:
    return {"additional_config": {"dflash": {"adaptive": on}}}


@pytest.mark.parametrize("engine", ["whole", "adaptive"])
def test_output_is_plain_decodings(answers: dict[str, list[Answer]], engine: str) -> None:
    for plain, ours in zip(answers["plain"], answers[engine], strict=False):
        assert ours.tokens == plain.tokens
    assert answers[engine][AFTER].tokens == answers["plain"][MIXED].tokens


@pytest.mark.parametrize("engine", ["whole", "adaptive"])
def test_no_more_is_verified_than_they_allow(answers: dict[str, list[Answer]], engine: str) -> None:
    off, some, mixed = (answers[engine][i].counters for i in (ALL_OFF, ALL_SOME, MIXED))
    assert (off["drafts"], off["accepted"]) == (0, 0)
    assert sum(some["per_position"][:3]) == some["accepted"] > 0
    if engine == "whole":  # what the controller finds worth it depends on the machine
        assert sum(mixed["per_position"][3:]) > 0, "those that say nothing get whole drafts"


@pytest.mark.parametrize("engine", ["whole", "adaptive"])
def test_a_malformed_request_is_refused_and_the_engine_goes_on(
    answers: dict[str, list[Answer]], engine: str
) -> None:
    assert "max_draft is 8: give a whole number from 0 to 7" in str(answers[engine][REFUSED].error)
    assert answers[engine][AFTER].error is None

"""``thinking_token_budget``: the end of thinking is forced where plain decoding forces it, in the
request that asked for it.

With drafts vLLM's own verification overshoots the budget by up to three tokens, and forces the end
into the output of neighbours that have none (its issue 39573). Both engines, and one that samples
its drafts, on the embedded pair; brackets, or a line's end and a phrase of several tokens, are
taken for the marks of thinking.

    pytest -s tests/engine/test_thinking_budget.py
"""

from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts
from engine.sampling_harness import Answer, Ask, Engine, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
COUNT = 12
MARKS = {"brackets": ("(", ")"), "a phrase": ("\n", "return self\n")}
GREEDY: dict[str, Any] = {"temperature": 0.0}


def asks() -> dict[str, Ask]:
    """Two of three requests have a budget, of 0 to 8 tokens."""
    prompts, common = held_out_prompts(COUNT), {"max_tokens": 48, "ignore_eos": True}
    budgets = [None if i % 3 == 2 else i % 9 for i in range(COUNT)]
    without = [common | GREEDY for _ in budgets]
    return {
        "greedy": Ask(
            prompts,
            [each | {"thinking_token_budget": b} for each, b in zip(without, budgets, strict=True)],
        ),
        "seeded": Ask(
            prompts,
            [
                common | {"temperature": 0.8, "seed": i, "thinking_token_budget": b}
                for i, b in enumerate(budgets)
            ],
        ),
        "none": Ask(prompts, without),
    }


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], dict[str, Answer]]:
    """By marks and engine, what came back for each ``Ask``; sampled drafts follow other random
    numbers, so those are asked greedy only."""
    kinds: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
        "plain": (None, {}, list(asks())),
        "ours": (DRAFTER, {}, list(asks())),
        "sampled drafts": (DRAFTER, {"draft_sample_method": "probabilistic"}, ["greedy"]),
    }
    wanted = {(marks, kind): kinds[kind] for marks in MARKS for kind in kinds}
    engines = []
    for (marks, _), (drafter, speculative, names) in wanted.items():
        start, end = MARKS[marks]
        args = {"reasoning_config": {"reasoning_start_str": start, "reasoning_end_str": end}}
        engines.append(
            Engine(
                TARGET,
                drafter,
                [asks()[name] for name in names],
                speculative=speculative,
                args=args,
            )
        )
    return {
        key: dict(zip(wanted[key][2], found, strict=True))
        for key, found in zip(wanted, run(engines), strict=True)
    }


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_output_is_plain_decodings(
    answers: dict[tuple[str, str], dict[str, Answer]], marks: str, name: str
) -> None:
    plain, ours = answers[marks, "plain"][name], answers[marks, "ours"][name]
    assert plain.error is ours.error is None
    assert ours.tokens == plain.tokens
    assert ours.counters["accepted"] > 0
    if name == "greedy":  # the budgets tell, and a neighbour without one is left alone
        free = answers[marks, "plain"]["none"].tokens
        same = [a == b for a, b in zip(plain.tokens, free, strict=True)]
        assert not all(same)
        assert all(same[2::3])


@pytest.mark.parametrize("marks", MARKS)
def test_sampled_drafts(answers: dict[tuple[str, str], dict[str, Answer]], marks: str) -> None:
    """Greedy requests of an engine whose drafts go through vLLM's own rejection sampler."""
    ours = answers[marks, "sampled drafts"]["greedy"]
    assert ours.error is None
    assert ours.tokens == answers[marks, "plain"]["greedy"].tokens
    assert ours.counters["accepted"] > 0

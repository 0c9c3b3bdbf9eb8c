"""The differential fuzzer's own parts: what it draws, what it calls alike, and how it shrinks."""

import json
import random
from copy import deepcopy
from typing import Any

import pytest

from fuzzing.compare import difference
from fuzzing.draw import (
    KNOWN,
    MAX_MODEL_LEN,
    Corpus,
    draw_common,
    draw_round,
    draw_settings,
    is_compared,
)
from fuzzing.shrink import shrink

CORPUS = Corpus([[5, 6, 7, 8] * 20, [9, 10, 11] * 30], ["return self.value\n", "def a(b):\n"], 64)
REQUEST: dict[str, Any] = {"id": 0, "prompt": [1], "params": {"temperature": 0.0}}


def rounds(seed: int, count: int, include: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    rng = random.Random(seed)
    return [
        draw_round(rng, CORPUS, draw_settings(rng) | draw_common(rng), include)
        for _ in range(count)
    ]


def test_a_seed_draws_the_same_again() -> None:
    assert rounds(3, 20) == rounds(3, 20) != rounds(4, 20)
    assert json.loads(json.dumps(rounds(3, 20))) == rounds(3, 20), "a case is printed as JSON"


def test_every_field_is_drawn_and_prompts_fit() -> None:
    requests = [r for drawn in rounds(0, 150) for r in drawn]
    assert all(1 <= len(r["prompt"]) < MAX_MODEL_LEN for r in requests)
    fields = {name for r in requests for name in r["params"]}
    assert fields >= {
        "seed",
        "n",
        "stop",
        "stop_token_ids",
        "logprobs",
        "prompt_logprobs",
        "structured_outputs",
        "bad_words",
        "min_tokens",
        "min_p",
    }
    assert not fields & set(KNOWN)
    assert {name for r in rounds(0, 50, KNOWN) for q in r for name in q["params"]} >= set(KNOWN)


def test_only_what_has_one_answer_is_compared() -> None:
    greedy, seeded, free = (
        {"params": p}
        for p in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0})
    )
    assert [is_compared(r, {"draft_sample_method": "greedy"}) for r in (greedy, seeded, free)] == [
        True,
        True,
        False,
    ]
    assert [
        is_compared(r, {"draft_sample_method": "probabilistic"}) for r in (greedy, seeded, free)
    ] == [True, False, False]


def answer(**changes: Any) -> dict[str, Any]:
    completion = {
        "token_ids": [4, 5],
        "text": "ab",
        "finish_reason": "length",
        "stop_reason": None,
        "cumulative_logprob": -1.0,
        "logprobs": [
            {"4": [-0.5, 1, "a"], "7": [-1.5, 2, "x"]},
            {"5": [-0.5, 1, "b"], "8": [-1.0, 2, "y"]},
        ],
    } | changes
    return {"completions": {"0": completion}, "finished": True, "num_prompt_tokens": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": [4, 6]}, "token 1: plain 5, with drafts 6"),
        ({"token_ids": [4]}, "token 1: plain 5, with drafts the end (length)"),
        ({"text": "ac"}, "text: plain 'ab', with drafts 'ac'"),
        ({"finish_reason": "stop"}, "finish_reason"),
        ({"stop_reason": 5}, "stop_reason"),
        ({"cumulative_logprob": -1.1}, "cumulative_logprob"),
        ({"cumulative_logprob": None}, "cumulative_logprob"),
        ({"logprobs": None}, "logprobs: plain True, with drafts False"),
        (
            {"logprobs": answer()["completions"]["0"]["logprobs"][:1]},
            "logprobs: plain has 2 positions",
        ),
    ],
)
def test_each_difference_is_seen(changes: dict[str, Any], words: str) -> None:
    assert difference(REQUEST, answer(), answer()) is None
    assert words in str(difference(REQUEST, answer(), answer(**changes)))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([-0.6, 1, "a"], "token 4"),
        ([-0.5, 2, "a"], "rank"),
        ([-0.5, 1, "z"], "text"),
        (None, "token 4 only plain"),
        ([-0.5001, 1, "a"], None),
    ],
)
def test_log_probabilities(entry: list[Any] | None, words: str | None) -> None:
    ours = deepcopy(answer())
    step = ours["completions"]["0"]["logprobs"][0]
    step.pop("4")
    if entry:
        step["4"] = entry
    found = difference(REQUEST, answer(), ours)
    assert found is None if words is None else words in str(found)


def test_refusals_have_to_be_alike() -> None:
    assert difference(REQUEST, {"error": "no"}, {"error": "no"}) is None
    assert "refused" in str(difference(REQUEST, answer(), {"error": "no"}))


def test_an_aborted_request_is_a_beginning() -> None:
    aborted = REQUEST | {"aborted_after": 1}
    part = answer(
        token_ids=[4],
        text="a",
        finish_reason=None,
        cumulative_logprob=-0.5,
        logprobs=answer()["completions"]["0"]["logprobs"][:1],
    )
    part["finished"] = False
    assert difference(aborted, answer(), part) is None
    assert difference(REQUEST, answer(), part) == "never finished"
    part["completions"]["0"]["token_ids"] = [9]
    assert "token 0" in str(difference(aborted, answer(), part))


def test_shrinking() -> None:
    """Down to the one neighbour, the one field and the end of the prompt that it takes."""
    requests = [
        {
            "id": i,
            "prompt": list(range(32)),
            "params": {"temperature": 0.0, "max_tokens": 9, "n": 1, "stop": ["a"]},
            "arrives": i,
        }
        for i in range(9)
    ]

    def differs(tried: list[dict[str, Any]], wanted: int) -> bool:
        by_id = {r["id"]: r for r in tried}
        return (
            6 in by_id and "stop" in by_id[wanted]["params"] and by_id[wanted]["prompt"][-1] == 31
        )

    small = shrink(requests, 2, differs)
    assert [r["id"] for r in small] == [2, 6]
    assert small[0]["params"] == {"temperature": 0.0, "max_tokens": 9, "stop": ["a"]}
    assert small[0]["prompt"] == [31]

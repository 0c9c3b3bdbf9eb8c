"""The differential fuzzer's own parts: what it draws, what it calls alike, and how it shrinks."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.harness import TARGET
from fuzzing import serving
from fuzzing.child import Crash
from fuzzing.compare import difference
from fuzzing.deaths import cause
from fuzzing.draw import (
    KNOWN,
    MAX_MODEL_LEN,
    ORDINARY,
    Corpus,
    draw_common,
    draw_round,
    draw_settings,
    is_compared,
)
from fuzzing.fuzzer import Fuzzer
from fuzzing.pairs import Pair
from fuzzing.shrink import shrink

CORPUS = Corpus([[5, 6, 7, 8] * 20, [9, 10, 11] * 30], ["return self.value\n", "def a(b):\n"], 64)
REQUEST: dict[str, Any] = {"id": 0, "prompt": [1], "params": {"temperature": 0.0}}


def rounds(seed: int, count: int, include: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    rng = random.Random(seed)
    return [
        draw_round(rng, CORPUS, draw_settings(rng) | draw_common(rng, ["yarn"]), include)
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
        "logprob_token_ids",
        "prompt_logprobs",
        "structured_outputs",
        "bad_words",
        "min_tokens",
        "min_p",
    }
    assert not fields & set(KNOWN)
    for drawn in rounds(0, 150):
        names = {name for r in drawn for name in r["params"]}
        assert not {"logprobs", "logprob_token_ids"} <= names, "vLLM loses the first of the two"
    assert {name for r in rounds(0, 50, KNOWN) for q in r for name in q["params"]} >= set(KNOWN)


def test_what_a_request_has_beside_its_parameters() -> None:
    """Prompts as embeddings are a part of their prompt, each LoRA is drawn, and a salt is."""
    requests = [r for drawn in rounds(0, 150) for r in drawn]
    parts = [(r["embeds"], len(r["prompt"])) for r in requests if "embeds" in r]
    assert all(0 <= start < end <= length for (start, end), length in parts)
    assert {end - start == length for (start, end), length in parts} == {True, False}
    assert {r["lora"] for r in requests if "lora" in r} == {1, 2, 3}
    assert {r["cache_salt"] for r in requests if "cache_salt" in r} == {"a", "b"}


def test_every_engine_has_room_for_its_requests_and_a_draft() -> None:
    """vLLM starts no engine with fewer tokens a step than requests, or than a draft and one."""
    rng, small = random.Random(0), 0
    for _ in range(300):
        drawn = draw_settings(rng)
        budget = drawn["args"]["max_num_batched_tokens"]
        assert budget >= drawn["args"]["max_num_seqs"]
        assert budget > drawn["num_speculative_tokens"]
        small += budget < 64
    assert small > 20


def test_a_window_takes_pages_for_each_group_of_layers() -> None:
    """With a window over the target's eight layers and none over the drafter's three vLLM counts
    pages for each group of three: engines with as few as without a window did not start."""
    rng = random.Random(0)
    for _ in range(300):
        args = draw_settings(rng, "window")["args"]
        block = args.get("block_size", 128)
        window = -(-min(31 + args["max_num_batched_tokens"], MAX_MODEL_LEN) // block) + 1
        needed = 3 * window + -(-MAX_MODEL_LEN // block)
        assert args["num_gpu_blocks_override"] > needed, "and one stays empty"


def test_what_vllm_answers_wrongly_beside_prompt_embeddings_is_not_drawn() -> None:
    """Guidance takes no tokenizer with the token that vLLM adds for them, and of a prompt without
    tokens vLLM penalizes those of a request before it."""
    rng = random.Random(0)
    drawn = [draw_common(rng, []) for _ in range(300)]
    with_embeds = [c["structured_outputs_config"] for c in drawn if c["enable_prompt_embeds"]]
    assert {config["backend"] for config in with_embeds} == {"auto", "xgrammar", "outlines"}
    requests = [r for drawn in rounds(0, 300) for r in drawn if "embeds" in r]
    whole = [r for r in requests if r["embeds"] == [0, len(r["prompt"])]]
    assert not any("repetition_penalty" in r["params"] for r in whole)
    assert any("repetition_penalty" in r["params"] for r in requests)


def test_engines_of_every_kind_are_drawn() -> None:
    rng = random.Random(0)
    drawn = [draw_common(rng, ["yarn", "window"]) for _ in range(300)]
    assert all(common.keys() == ORDINARY.keys() for common in drawn)
    assert {c["override"] for c in drawn} == {"none", "yarn", "window"}
    assert {c["reasoning"] for c in drawn} == {"none", "outside", "inside"}
    backends = {c["structured_outputs_config"]["backend"] for c in drawn}
    assert backends == {"auto", "xgrammar", "guidance", "outlines"}


class Engine:
    """One that ends at whatever ``ends`` says of its arguments and a request."""

    def __init__(self, ends: Callable[[dict[str, Any], dict[str, Any]], bool]) -> None:
        self._ends = ends

    def start(self, args: dict[str, Any], **_: Any) -> None:
        self._args = args

    def restart(self) -> None:
        pass

    def send(self, do: str, requests: list[dict[str, Any]], **_: Any) -> None:
        self._asked = requests

    def read(self) -> dict[str, Any]:
        if any(self._ends(self._args, request) for request in self._asked):
            raise Crash("the process ended with -11:\n  ...\nAttributeError: no float32")
        return {"answers": {str(r["id"]): answer() for r in self._asked}, "counters": {}}


def asked(ends: Callable[..., bool], others: Callable[..., bool] = lambda *_: False) -> Fuzzer:
    """A fuzzer after one round: the engine with drafts ends at ``ends`` and ``others``."""
    fuzzer = Fuzzer("embedded", Pair(Path("t"), Path("d"), CORPUS, {}), Path())
    fuzzer.plain = Engine(ends)  # type: ignore[assignment]
    fuzzer.ours = Engine(lambda *a: ends(*a) or others(*a))  # type: ignore[assignment]
    fuzzer._adapters = list  # type: ignore[method-assign]
    settings = draw_settings(random.Random(0)) | {"draft_sample_method": "greedy"}
    fuzzer.start(ORDINARY | {"enable_lora": True}, settings)
    fuzzer.round(
        [
            REQUEST | {"id": i, "arrives": i, "params": {"temperature": 0.0, "stop": ["a"] * i}}
            for i in range(4)
        ]
    )
    return fuzzer


@pytest.mark.parametrize(
    ("ends", "name"),
    [
        (lambda args, _: args["enable_lora"], "enable_lora"),
        (lambda _, request: request["params"].get("stop") == ["a", "a"], "stop"),
    ],
)
def test_what_ends_both_engines_is_vllms_own(ends: Callable[..., bool], name: str) -> None:
    """LoRA of experts ends any of vLLM's engines on a CPU: the fuzzer counted every death as a
    difference, and compared nothing from then on."""
    fuzzer = asked(ends)
    assert fuzzer.tally.differences == []
    assert fuzzer.left_out == {name}
    assert fuzzer.tally.deaths[0].endswith(f"no float32); left out from now on: {name}")
    assert fuzzer.tally.deaths[0].count("no float32") == 2, "the end of each engine's log"
    assert fuzzer.tally.outcomes["alike"] == 4


def test_what_ends_the_engine_with_drafts_alone_is_a_difference() -> None:
    fuzzer = asked(lambda *_: False, lambda _, request: request["id"] == 2)
    assert fuzzer.left_out == set()
    assert fuzzer.tally.deaths == []
    assert "an engine ended: drafts" in fuzzer.tally.differences[0]
    fuzzer = asked(lambda _, r: r["id"] == 1 and "stop" in r["params"], lambda _, r: r["id"] == 2)
    assert len(fuzzer.tally.deaths) == len(fuzzer.tally.differences) == 1


def test_no_single_cause() -> None:
    assert cause(ORDINARY, [REQUEST], lambda *_: False) is None
    assert cause(ORDINARY, [REQUEST], lambda *_: True) is None, "a new engine goes on"


class Front:
    """vLLM's: it counts a request before the engine's core, which refuses all, sees it."""

    def __init__(self) -> None:
        self._requests: set[str] = set()

    def add_request(self, request_id: str, **_: Any) -> None:
        self._requests.add(request_id)
        raise ValueError("vocab size too small; 4096 vs 4097")

    def abort_request(self, request_ids: list[str]) -> None:
        self._requests.difference_update(request_ids)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Any]:
        return []


@pytest.mark.vllm
def test_what_the_core_refuses_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front waited for it: the round was given up, and the fuzzer said "never done" and left
    grammars out, without a word of the refusal."""
    serving.sampling_params(REQUEST)  # imports vLLM, which takes seconds
    monkeypatch.setattr(serving, "SILENCE", 0.5)
    llm = SimpleNamespace(llm_engine=Front())
    found = serving.run_round(llm, [REQUEST | {"arrives": 0}], lambda _: {}, ())  # type: ignore[arg-type]
    assert found == {0: {"error": "ValueError: vocab size too small; 4096 vs 4097"}}


@pytest.mark.vllm
def test_an_engine_leaves_no_tokenizer_to_the_next() -> None:
    """The token that vLLM adds for prompt embeddings stayed in its one tokenizer, and guidance
    refused all grammars of the engines after it in that process alone."""
    from vllm.tokenizers import cached_get_tokenizer

    tokenizer = cached_get_tokenizer(str(TARGET))
    serving.Server().stop()
    assert cached_get_tokenizer(str(TARGET)) is not tokenizer


def test_only_what_has_one_answer_is_compared() -> None:
    greedy, seeded, free, minus_one = (
        {"params": {"temperature": temperature} | seed}
        for temperature, seed in ((0.0, {}), (1.0, {"seed": 1}), (1.0, {}), (1.0, {"seed": -1}))
    )
    assert not is_compared(minus_one, {"draft_sample_method": "greedy"}), "no seed for vLLM"
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

"""vLLM's request features with a drafter: greedy float32 output equals plain vLLM's token for
token, or vLLM's refusal is passed on.

Two engines on the embedded pair, without and with the drafter, are asked the same; a third prefills
prompts in chunks. Every test that compares also sees that drafts were made and accepted meanwhile.

    pytest -s tests/engine/test_features.py
"""

import json
import re

import pytest

from engine.feature_requests import (
    ALLOWED,
    BACKENDS,
    CHOICES,
    COUNT,
    EOS,
    GREEDY,
    MAX_MODEL_LEN,
    PENALTIES,
    REGEX,
    SEEDED,
    STOPS,
    STRUCTURED,
    answers,
    stop_token,
    up_to_the_limit,
)
from engine.sampling_harness import Answer

__all__ = ["answers", "stop_token"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def same(answers: dict[str, dict[str, Answer]], name: str) -> Answer:
    """Our answer, after a look that it is plain vLLM's, whole, and that drafts were accepted on the
    way."""
    plain, ours = answers["plain"][name], answers["ours"][name]
    assert plain.error is None
    assert ours.error is None
    for a, b in zip(plain.completions, ours.completions, strict=True):
        assert [
            {k: c[k] for k in ("token_ids", "text", "finish_reason", "stop_reason")} for c in b
        ] == [{k: c[k] for k in ("token_ids", "text", "finish_reason", "stop_reason")} for c in a]
    assert ours.counters["accepted"] > 0
    print(f"{name}: {ours.accepted_share:.2f} accepted a draft")
    return ours


def test_greedy(answers: dict[str, dict[str, Answer]]) -> None:
    assert same(answers, "plain").accepted_share > 1


def test_requests_leave_nothing_behind(answers: dict[str, dict[str, Answer]]) -> None:
    """After all of the requests of this file the engine answers as at first."""
    assert answers["ours"]["after all"].tokens == answers["ours"]["plain"].tokens


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(answers: dict[str, dict[str, Answer]], name: str) -> None:
    assert same(answers, name).tokens != answers["plain"]["plain"].tokens


@pytest.mark.parametrize("name", ["logit_bias", "min_p"])
def test_logit_bias_and_min_p_are_refused_by_vllm(
    answers: dict[str, dict[str, Answer]], name: str
) -> None:
    """With any speculative method; the request alone fails."""
    assert answers["plain"][name].error is None
    assert (
        "min_p and logit_bias sampling parameters are not yet supported with speculative decoding"
        in str(answers["ours"][name].error)
    )


def test_bad_words(answers: dict[str, dict[str, Answer]]) -> None:
    texts = [c["text"] for (c,) in same(answers, "bad_words").completions]
    assert not [text for text in texts if "self" in text.split() or "return" in text.split()]
    assert texts != [c["text"] for (c,) in answers["plain"]["plain"].completions]


def test_allowed_token_ids(answers: dict[str, dict[str, Answer]]) -> None:
    assert {
        token for (tokens,) in same(answers, "allowed_token_ids").tokens for token in tokens
    } <= set(ALLOWED)


def assert_close(ours: dict[str, list], plain: dict[str, list]) -> None:
    """One position's log-probabilities by token, each with its rank."""
    assert ours.keys() == plain.keys()
    for token, (logprob, rank) in plain.items():
        assert ours[token] == [pytest.approx(logprob, abs=2e-3), rank]


def same_logprobs(
    answers: dict[str, dict[str, Answer]], name: str
) -> list[list[dict[str, list]] | None]:
    """Our log probabilities, a list a prompt with an entry a token, after a look that they are
    plain vLLM's."""
    same(answers, name)
    found = []
    for (plain,), (ours,) in zip(
        answers["plain"][name].completions, answers["ours"][name].completions, strict=True
    ):
        found.append(ours["logprobs"])
        if not plain["logprobs"]:
            assert not ours["logprobs"]
            continue
        assert len(ours["logprobs"]) == len(ours["token_ids"])
        assert ours["cumulative_logprob"] == pytest.approx(plain["cumulative_logprob"], abs=2e-2)
        for a, b in zip(ours["logprobs"], plain["logprobs"], strict=True):
            assert_close(a, b)
    return found


@pytest.mark.parametrize("name", ["logprobs", "logprobs of all tokens", "logprobs, seeded"])
def test_logprobs(answers: dict[str, dict[str, Answer]], name: str) -> None:
    found = same_logprobs(answers, name)
    if name == "logprobs of all tokens":
        assert {len(entry) for entries in found for entry in entries or []} == {4096}


@pytest.mark.parametrize(
    ("name", "every"), [("logprob_token_ids", 2), ("logprob_token_ids, seeded", 1)]
)
def test_logprob_token_ids(answers: dict[str, dict[str, Answer]], name: str, every: int) -> None:
    """vLLM's rejection sampler drops them: with drafts such a request had no log probabilities, and
    a sampled one had those of logits after its temperature and top-k."""
    found = same_logprobs(answers, name)
    assert all(
        {"5", str(200 + i)} <= entry.keys()
        for i in range(every - 1, COUNT, every)
        for entry in found[i] or [{}]
    )


def test_repetition_detection(answers: dict[str, dict[str, Answer]]) -> None:
    """A repetition that ends among accepted drafts ends the request there."""
    ended = [
        c
        for (c,) in same(answers, "repetition_detection").completions
        if c["finish_reason"] != "length"
    ]
    assert ended
    print({c["finish_reason"] for c in ended}, {str(c["stop_reason"]) for c in ended})


def test_prompt_logprobs(answers: dict[str, dict[str, Answer]]) -> None:
    same(answers, "prompt_logprobs")
    for plain, ours in zip(
        answers["plain"]["prompt_logprobs"].prompt_logprobs,
        answers["ours"]["prompt_logprobs"].prompt_logprobs,
        strict=True,
    ):
        assert ours[0] is plain[0] is None
        for a, b in zip(ours[1:], plain[1:], strict=True):
            assert_close(a, b)


def test_stop_strings(answers: dict[str, dict[str, Answer]]) -> None:
    """A stop string that ends inside a block of accepted tokens cuts the text, and what was
    accepted after it is dropped."""
    stopped = [c for (c,) in same(answers, "stop").completions if c["finish_reason"] == "stop"]
    assert len(stopped) > COUNT // 2
    assert all(
        c["stop_reason"] in STOPS and not any(s in c["text"] for s in STOPS) for c in stopped
    )


def test_include_stop_str_in_output(answers: dict[str, dict[str, Answer]]) -> None:
    stopped = [
        c
        for (c,) in same(answers, "include_stop_str_in_output").completions
        if c["finish_reason"] == "stop"
    ]
    assert len(stopped) > COUNT // 2
    assert all(c["text"].endswith(c["stop_reason"]) for c in stopped)


def test_stop_token_ids(answers: dict[str, dict[str, Answer]], stop_token: int) -> None:
    stopped = [
        c for (c,) in same(answers, "stop_token_ids").completions if c["finish_reason"] == "stop"
    ]
    assert len(stopped) >= COUNT // 2
    assert all(
        c["token_ids"].index(stop_token) == len(c["token_ids"]) - 1
        and c["stop_reason"] == stop_token
        for c in stopped
    )


def test_min_tokens(answers: dict[str, dict[str, Answer]], stop_token: int) -> None:
    """The stop token is forbidden before the 20th token, drafted or not."""
    for (completion,) in same(answers, "min_tokens").completions:
        assert stop_token not in completion["token_ids"][:20]
        assert len(completion["token_ids"]) >= 20


def test_eos_ends_a_request(answers: dict[str, dict[str, Answer]]) -> None:
    ended = [c for (c,) in same(answers, "eos").completions if c["finish_reason"] == "stop"]
    assert ended
    assert all(c["token_ids"][-1] == EOS and EOS not in c["token_ids"][:-1] for c in ended)


def test_ignore_eos(answers: dict[str, dict[str, Answer]]) -> None:
    completions = [c for (c,) in same(answers, "ignore_eos").completions]
    assert any(EOS in c["token_ids"][:-1] for c in completions)
    assert all(len(c["token_ids"]) == GREEDY["max_tokens"] for c in completions)


def test_last_tokens_before_max_model_len(answers: dict[str, dict[str, Answer]]) -> None:
    """With 1 to 20 positions left a block does not fit, and the output is still plain vLLM's to the
    last token."""
    ours = same(answers, "max_model_len")
    lengths = [
        len(prompt) + len(tokens)
        for prompt, (tokens,) in zip(up_to_the_limit(), ours.tokens, strict=True)
    ]
    assert lengths == [MAX_MODEL_LEN] * len(lengths)
    assert all(c["finish_reason"] == "length" for (c,) in ours.completions)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_output(answers: dict[str, dict[str, Answer]], name: str) -> None:
    """vLLM cuts a draft at its first token that the grammar forbids; what is left is verified under
    the grammar."""
    for (completion,) in same(answers, name).completions:
        text = completion["text"]
        if name == "choice":
            assert text in CHOICES
        elif completion["finish_reason"] == "stop":
            assert (
                re.fullmatch(REGEX, text)
                if name == "regex"
                else json.loads(text)["kind"] in ("class", "function", "module")
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_structured_output_backends(answers: dict[str, dict[str, Answer]], backend: str) -> None:
    """Plain with the same backend: of two tokens that the grammar allows, not all backends allow
    both."""
    ours, plain = answers[backend]["regex"], answers[f"plain {backend}"]["regex"]
    assert ours.error is plain.error is None
    assert ours.tokens == plain.tokens
    assert ours.counters["accepted"] > 0


def test_custom_logits_processors_are_refused_by_vllm(
    answers: dict[str, dict[str, Answer]],
) -> None:
    """With any speculative method, when the engine starts."""
    error = answers["logits processor"]["plain"].error
    assert "Custom logits processors are not supported when speculative decoding is enabled" in str(
        error
    )


def test_all_at_once(answers: dict[str, dict[str, Answer]]) -> None:
    """Eight requests with eight different settings in one batch: nobody gets his neighbour's. The
    seeded one has a test of its own."""
    plain, ours, chunked = (
        answers[engine]["all at once"] for engine in ("plain", "ours", "chunked")
    )
    seeded = 6
    for row in range(COUNT):
        if row != seeded:
            assert ours.tokens[row] == plain.tokens[row] == chunked.tokens[row]
    assert ours.tokens[seeded] == chunked.tokens[seeded]
    assert ours.counters["accepted"] > 0


def test_a_seed_gives_the_same_again(answers: dict[str, dict[str, Answer]]) -> None:
    """In a batch of eight, alone, and as one of ``n``; another seed gives something else."""
    ours = answers["ours"]
    assert (
        ours["seed"].tokens[0] == ours["seed, one at a time"].tokens[0] == [ours["n"].tokens[0][0]]
    )
    assert all(a != b for a, b in zip(ours["seed"].tokens, ours["other seed"].tokens, strict=True))
    assert ours["seed"].counters["accepted"] > 0


def test_top_k_alone_in_a_step(answers: dict[str, dict[str, Answer]]) -> None:
    """A request with top_k and no top_p, alone in the batch, ended the CPU engine: its prompt's
    step verifies no drafts, and the maximum of an empty tensor of top-k is an error.
    ``patches/v1_no_drafts.py`` has the cure."""
    assert len(answers["ours"]["top_k, one at a time"].tokens[0][0]) == SEEDED["max_tokens"]


def test_a_seed_and_a_prompt_in_chunks(answers: dict[str, dict[str, Answer]]) -> None:
    """A request with a seed and temperature above 0 whose prompt is prefilled in chunks ended the
    CPU engine: "CPU Generator does not use offset". vLLM samples a token after every chunk, throws
    it away, and takes the random numbers back by moving the generator's offset, which only CUDA's
    generators have. ``patches/v1_cpu_seeds.py`` has the cure. Tokens do not depend on the chunks.
    """
    whole, chunked = answers["ours"]["seed"], answers["chunked"]["seed"]
    assert chunked.error is None
    assert chunked.tokens == whole.tokens
    assert answers["chunked"]["plain"].tokens == answers["plain"]["plain"].tokens


@pytest.mark.parametrize("name", ["seed", "logprobs, seeded", "all at once"])
def test_a_seed_by_noise_in_float64(answers: dict[str, dict[str, Answer]], name: str) -> None:
    """With ``use_fp64_gumbel`` vLLM does not sample by its CPU kernel: a token takes many
    numbers of its generator. A seed gave another text with a drafter than without."""
    plain, ours = answers["plain fp64"][name], answers["fp64"][name]
    assert plain.error is ours.error is None
    assert ours.tokens == plain.tokens
    assert ours.tokens != answers["ours"][name].tokens
    assert ours.counters["accepted"] > 0


def test_a_seed_gives_what_it_gives_without_a_drafter(
    answers: dict[str, dict[str, Answer]],
) -> None:
    """Token for token: the noise of an output token depends on the seed and on its place alone,
    however many tokens were verified with it."""
    plain, ours = answers["plain"]["seed"], answers["ours"]["seed"]
    assert ours.tokens == plain.tokens
    assert ours.counters["accepted"] > 0


def test_n_completions(answers: dict[str, dict[str, Answer]]) -> None:
    """The i-th of ``n`` is what the seed plus i gives alone."""
    ours = answers["ours"]
    assert [len(completions) for completions in ours["n"].completions] == [3, 3]
    assert [[tokens] for tokens in ours["n"].tokens[0]] == ours["n, each alone"].tokens
    assert len({tuple(tokens) for tokens in ours["n"].tokens[0]}) == 3

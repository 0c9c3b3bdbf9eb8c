"""What each method's engine is started with, and what is refused."""

import pytest

from vllm_dflash.evaluation.methods import DEFAULT_METHODS, Drafter, UsageError, parse_methods

DRAFTERS = {"one": Drafter("/one", 7), "two": Drafter("/two", 15)}


def test_the_default_set():
    methods = parse_methods(DEFAULT_METHODS, DRAFTERS)
    assert [m.name for m in methods] == ["plain", "dflash", "native", "ngram"]
    dflash = {"method": "dflash", "model": "/one", "num_speculative_tokens": 7}
    assert [m.speculative_config for m in methods[:3]] == [None, dflash, dflash]
    assert [m.additional_config for m in methods] == [
        None,
        {"dflash": {"adaptive": False}},
        None,
        None,
    ]


def test_only_ours_run_with_the_plug_in():
    methods = parse_methods("plain,dflash,adaptive,native,ngram,suffix,eagle3", DRAFTERS, "/head")
    assert [m.environment["VLLM_DFLASH"] for m in methods] == ["0", "1", "1", "0", "0", "0", "0"]


def test_k_and_drafter():
    short, other, native = parse_methods("dflash:3, dflash@two, native@two:5", DRAFTERS)
    assert (short.drafter, short.num_speculative_tokens) == ("one", 3)
    assert (other.speculative_config or {})["model"] == "/two"
    assert other.num_speculative_tokens == 15
    assert (native.speculative_config or {}) == {
        "method": "dflash",
        "model": "/two",
        "num_speculative_tokens": 5,
    }


def test_suffix_remembers_no_earlier_answers():
    """A repeat asks for the same text again; with the memory of it the second repeat measures
    copying."""
    suffix, longer = parse_methods("suffix,suffix:8", {})
    assert suffix.speculative_config == {
        "method": "suffix",
        "suffix_decoding_max_cached_requests": 0,
    }
    assert (longer.speculative_config or {})["num_speculative_tokens"] == 8


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "give some of plain"),
        ("medusa", "KIND of plain"),
        ("dflash:x", "KIND:K"),
        ("dflash:0", "K is 1 or more"),
        ("plain:3", "`plain`"),
        ("plain,plain", "give each once"),
        ("dflash@three", "give --draft three=PATH"),
        ("ngram@one", "only adaptive, dflash, native"),
        ("eagle3", "give --eagle3 PATH"),
    ],
)
def test_refusals_name_the_remedy(text, remedy):
    with pytest.raises(UsageError, match=remedy):
        parse_methods(text, DRAFTERS)


def test_a_drafter_is_needed():
    with pytest.raises(UsageError, match="give --draft PATH"):
        parse_methods("native", {})


def test_a_head_that_no_method_uses_is_refused() -> None:
    with pytest.raises(UsageError, match="--methods has none that uses it"):
        parse_methods("plain,dflash", DRAFTERS, "/head")

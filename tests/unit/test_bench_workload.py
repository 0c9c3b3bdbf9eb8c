"""Prompt sets, their cuts, and the points of a sweep."""

import json

import pytest

from vllm_dflash.evaluation.workload import (
    Lengths,
    PromptSet,
    dataset_prompts,
    default_num_prompts,
    file_prompts,
    points,
    random_prompts,
)
from vllm_dflash.prompts import PromptError

LINES = {
    "gsm8k": {"question": "abc", "answer": "no"},
    "math-500": {"problem": "abc", "solution": "no"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "abc", "test": "no"},
    "mbpp": {"text": "abc", "code": "no"},
    "mt-bench": {"question_id": 81, "turns": ["abc", "then"]},
}


class Tokenizer:
    """A token a character; with a chat template, "<" before and ">" after."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, **_):
        return "".join(f"<{m['content']}>" for m in messages)


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return str(path)


def test_requests_generate_different_numbers_of_tokens():
    """The same whoever asks, and of the first few the same as of more."""
    found = Lengths(32, 96).take(200)
    assert (min(found), max(found)) == (32, 96)
    assert Lengths(32, 96).take(10) == found[:10]
    assert Lengths(8, 8).take(3) == [8, 8, 8]
    assert (str(Lengths(32, 96)), str(Lengths(8, 8))) == ("32-96", "8")


@pytest.mark.parametrize("name", LINES)
def test_datasets(tmp_path, name):
    path = write(tmp_path / "set.jsonl", LINES[name], "", LINES[name])
    assert dataset_prompts(name, path, Tokenizer(), 256) == PromptSet(name, [[97, 98, 99]] * 2)
    assert dataset_prompts(name, path, Tokenizer("a template"), 256).prompts[0] == [
        60,
        97,
        98,
        99,
        62,
    ]


def test_mbpp_by_its_other_field(tmp_path):
    assert dataset_prompts(
        "mbpp", write(tmp_path / "m.jsonl", {"prompt": "abc"}), Tokenizer(), 256
    ).prompts == [[97, 98, 99]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON .*: give one object a line"),
        ({"problem": "a MATH line"}, "line 2: no text in question: .* give the set's own"),
        ({"question": "  "}, "line 2: no text"),
        ([1], "line 2: no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(PromptError, match=message):
        dataset_prompts(
            "gsm8k", write(tmp_path / "set.jsonl", LINES["gsm8k"], line), Tokenizer(), 256
        )


def test_our_own_form(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"prompt": "abc"},
        {"messages": [{"role": "user", "content": "d"}]},
        {"prompt_token_ids": [5, 6]},
    )
    assert file_prompts(path, Tokenizer(), 256) == PromptSet(
        "mine", [[97, 98, 99], [60, 100, 62], [5, 6]]
    )
    with pytest.raises(PromptError, match=r"line 1: give prompt"):
        file_prompts(write(tmp_path / "bad.jsonl", {"prompt_token_ids": [256]}), Tokenizer(), 256)


def test_prompts_that_look_like_some(tmp_path):
    """True counts as a token id in Python, and a template writes an opening to no messages."""
    for line, message in (
        ({"prompt_token_ids": [True, False]}, "line 1: give prompt"),
        ({"messages": []}, "line 1: messages is empty: give at least one message"),
        ({"messages": [], "prompt": ""}, "line 1: messages is empty"),
    ):
        with pytest.raises(PromptError, match=message):
            file_prompts(write(tmp_path / "bad.jsonl", line), Tokenizer("a template"), 256)
    path = write(tmp_path / "both.jsonl", {"messages": [], "prompt": "a"})
    assert file_prompts(path, Tokenizer("a template"), 256).prompts == [[97]]


def test_a_byte_order_mark(tmp_path):
    """A batch run took it, and --prompts of every other command did not."""
    path = write(tmp_path / "marked.jsonl", '\ufeff{"prompt": "a\u2028b"}')
    assert file_prompts(path, Tokenizer(), 9000).prompts == [[97, 0x2028, 98]]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PromptError, match="is empty: give at least one line"):
        file_prompts(write(tmp_path / "empty.jsonl", ""), Tokenizer(), 256)
    with pytest.raises(PromptError, match="cannot be read"):
        file_prompts(str(tmp_path / "none.jsonl"), Tokenizer(), 256)


def test_a_target_without_a_tokenizer(tmp_path):
    with pytest.raises(PromptError, match="no tokenizer"):
        dataset_prompts("gsm8k", write(tmp_path / "set.jsonl", LINES["gsm8k"]), None, 256)


def test_lengths():
    prompts = PromptSet("x", [[1, 2, 3], [4], [5, 6]])
    assert prompts.take(4, None) == [[1, 2, 3], [4], [5, 6], [1, 2, 3]]
    assert prompts.take(4, 2) == [[1, 2], [4, 5], [5, 6], [1, 2]]
    assert prompts.take(1, 8) == [[1, 2, 3, 4, 5, 6, 1, 2]]


def test_random_prompts_are_the_same_each_time():
    assert random_prompts(300) == random_prompts(300)
    assert max(max(prompt) for prompt in random_prompts(300).prompts) == 299


def test_points():
    found = points(["a"], [None, 64], [0.0, 1.0], [1, 16], None)
    assert len(found) == 8
    assert [(p.concurrency, p.num_prompts) for p in found[:2]] == [(1, 32), (16, 64)]
    assert str(found[-1]) == "a of 64 tokens, temperature 1, 16 at a time"
    found = points(["a"], [None], [0.0, 1.0], [4, 8], [5, 9])
    assert [p.num_prompts for p in found] == [5, 9, 5, 9]
    assert default_num_prompts(32) == 128

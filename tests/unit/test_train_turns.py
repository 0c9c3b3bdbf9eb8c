"""Where a user's turn stands in a chat template is found for templates of several families; and
which turns are kept."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.tables import SelfPrompts
from vllm_dflash.training.turns import Sieve, Turn, ascii_share, find_turn, normal_form, repetition

TARGET = Path(__file__).parents[2] / "examples" / "embedded_pair" / "target"
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou"
    " help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor"
    " %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's and Qwen2.5's kind: a system prompt that the template adds by itself."""
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking"
    " %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{"
    " m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt"
    " %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{"
    " m.content }} {% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}USER: {{ m.content }} {% endfor %}{% if add_generation_prompt"
    " %}ASSISTANT:{% endif %}"
)
STRICT = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('give a system message') }}{% endif"
    " %}{{ messages[1].content }}"
)
ECHO = "{{ messages[0].content }}: {{ messages[0].content }}"
LENGTHS = "{{ messages[0].content | length }} characters: {{ messages[0].content }}"
NOTHING = "{{ messages[0].content }}"


def tokenizer(template: str | None) -> Any:
    found = AutoTokenizer.from_pretrained(TARGET)
    found.add_special_tokens({"additional_special_tokens": list(MARKS)})
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "header", "stop"),
    [
        (CHATML, "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (QWEN3, "<|im_start|>user\n", "<|im_end|>"),
        (LLAMA3, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ],
)
def test_marks_that_are_tokens(template: str, header: str, stop: str) -> None:
    found = tokenizer(template)
    turn = find_turn(found, {"enable_thinking": False}, [0])
    assert found.decode(turn.header) == header
    assert turn == Turn(
        found(header)["input_ids"], "", sorted([0, found.convert_tokens_to_ids(stop)]), "", False
    )
    message = found.apply_chat_template(
        [{"role": "user", "content": "What is a fold?"}], tokenize=True, return_dict=False
    )
    assert message[: len(turn.header)] == turn.header


def test_marks_that_are_text() -> None:
    """The space before a message becomes one token with its first word, so it is the model's to
    write; a mark of text ends the turn."""
    found = tokenizer(LLAMA2)
    turn = find_turn(found, {}, [0])
    assert (found.decode(turn.header), turn.mark, turn.stops, turn.endless) == (
        "[INST]",
        "[/INST]",
        [0],
        False,
    )
    assert turn.rest.strip() == ""
    sieve = Sieve(found, turn, SelfPrompts())
    assert (
        sieve.keep(found(" What is a list of lists? [/INST] It is")["input_ids"])
        == "What is a list of lists?"
    )
    turn = find_turn(tokenizer(VICUNA), {}, [0])
    assert (turn.mark, turn.endless) == ("ASSISTANT:", False)


def test_a_template_without_a_header() -> None:
    """As the embedded target's: a text begins after the token that ends the one before, and where
    it was cut is as good as any place."""
    found = tokenizer(NOTHING)
    turn = find_turn(found, {}, [0])
    assert turn == Turn([0], "", [0], "", True)
    assert (
        Sieve(found, turn, SelfPrompts()).keep(found("import json\nimport os, re")["input_ids"])
        == "import json\nimport os, re"
    )
    found.eos_token = None
    with pytest.raises(
        TrainingError,
        match="no header for a user, and its tokenizer no first token: give files of prompts",
    ):
        find_turn(found, {}, [])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template in its tokenizer, so it cannot write a user's turn: give files"),
        (STRICT, r"refuses a user's message alone \(give a system message\): give files"),
        (ECHO, "does not write a user's message once"),
        (LENGTHS, "another header for another message"),
    ],
)
def test_refused_with_the_remedy(template: str | None, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        find_turn(tokenizer(template), {}, [0])
    with pytest.raises(TrainingError, match="no tokenizer, so it cannot write"):
        find_turn(None, {}, [0])


def test_the_sieve() -> None:
    """Each reason once; a turn is kept without what ends it, and only the first of several that are
    alike."""
    found = tokenizer(CHATML)
    sieve = Sieve(found, find_turn(found, {}, [0]), SelfPrompts())

    def turn(text: str, end: str = "<|im_end|>\n") -> str | None:
        return sieve.keep(found(text + end, add_special_tokens=False)["input_ids"])

    assert turn("How do I sort 3 lists in Python?") == "How do I sort 3 lists in Python?"
    assert turn("  how do I sort 12 lists, in python?\n") is None
    assert turn("How do I sort a dictionary?", "") is None
    assert turn("a<|im_start|>user\nand then some more") is None
    assert turn("Hi") is None
    assert turn("") is None
    assert turn("Как отсортировать список?") is None
    assert turn("no no no no no no no no no no no no no no no no") is None
    assert turn("Wie ändert man eine Liste in Python?") == "Wie ändert man eine Liste in Python?"
    assert dict(sieve.left_out) == {
        "repeated": 1,
        "unfinished": 1,
        "with special tokens": 1,
        "too short": 2,
        "in other letters": 1,
        "repeating themselves": 1,
    }
    anything = Sieve(
        found,
        find_turn(found, {}, [0]),
        SelfPrompts(self_ascii_letters=0, self_repetition=1, self_least_tokens=1),
    )
    for text in (
        "Как отсортировать список?",
        "no no no no no no no no no no no no no no no no",
        "Hi",
    ):
        assert anything.keep(found(text + "<|im_end|>")["input_ids"]) == text


def test_measures() -> None:
    assert ascii_share("Wie geht's, Jürgen?") == pytest.approx(13 / 14)
    assert ascii_share("1 + 1 = ?") == 1
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert (
        normal_form("List 5 ways!") == normal_form("list  17 WAYS") != normal_form("list ways to")
    )
    assert normal_form("1 + 1") != normal_form("2 + 2")

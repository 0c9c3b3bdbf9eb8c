"""Prompts in all their forms become the token ids that are served; broken ones are refused by line;
the split holds still."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_dflash.prompts import PromptError, load_prompts
from vllm_dflash.training.engines import device_sets
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.prompts import Reader, split
from vllm_dflash.training.tables import Data

TARGET = Path(__file__).parents[2] / "examples" / "embedded_pair" / "target"
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in"
    " messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{%"
    " endif %}{{ extra }}"
)


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(TARGET)
    found.chat_template = TEMPLATE
    return found


def lines(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def test_forms(tokenizer, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "import os\n"},
        "",
        {"messages": [{"role": "u", "content": "hi"}]},
        {"prompt_token_ids": [5, 6], "response": "x = 1"},
        {"prompt_token_ids": [5, 7], "response_token_ids": [8, 9]},
        {"prompt_token_ids": [5, 8], "response": "x = 1", "finish_reason": "length"},
    )
    found = list(Reader(tokenizer, 4096, '{"extra": "!"}').read(path))
    assert [tokenizer.decode(p.ids) for p in found[:2]] == ["import os\n", "<u>hi\n<a>!"]
    assert found[2].response == [*tokenizer("x = 1")["input_ids"], tokenizer.eos_token_id]
    assert (found[3].ids, found[3].response) == ([5, 7], [8, 9])
    assert found[4].response == tokenizer("x = 1")["input_ids"], (
        "cut by a limit, as the recorder notes: no end token"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty: give at least one line"),
        ([{"prompt": "a"}, "{"], "line 2 is not JSON"),
        ([{"prompt": "a"}, "", {"text": "b"}], "line 3: give prompt (text), messages"),
        ([[1]], "line 1: it holds a list"),
        ([None], "line 1: it holds null"),
        ([{"prompt_token_ids": [5000]}], "line 1: prompt_token_ids is no list of ids below 4096"),
        ([{"prompt_token_ids": []}], "line 1: prompt_token_ids is no list"),
        ([{"prompt": ""}], "line 1: give prompt"),
        ([{"prompt": "a", "response": ["b"]}], "line 1: response is a list: give the answer's"),
        ([{"prompt": "a", "response": 0}], "line 1: response is a number: give the answer's text"),
        ([{"messages": ["x"]}], "line 1: message 1 is a text: give an object with role and"),
        (
            [{"prompt": "a", "response": "b", "finish_reason": 7}],
            "line 1: finish_reason is a number: give stop, or length",
        ),
        (
            [{"messages": [{"role": "system", "content": "x"}]}],
            "line 1: the target's chat template refuses these messages (no system)",
        ),
    ],
)
def test_broken_lines(tokenizer, tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(TrainingError) as found:
        list(Reader(tokenizer, 4096, "{}").read(lines(tmp_path / "p.jsonl", *rows)))
    assert words in str(found.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a\ud83d"},
        {"messages": [{"role": "u", "content": "\udc00"}]},
        {"prompt": "a", "response": "\ud83d"},
        {"prompt_token_ids": [5], "response": "\ud83d"},
    ],
)
def test_half_of_a_surrogate_pair_is_named_by_its_line(
    tokenizer, tmp_path: Path, row: dict[str, Any]
) -> None:
    """JSON's escapes can write it, and no tokenizer takes it: a TypeError without a line. The
    doctor, bench and batch read it so too."""
    path = lines(tmp_path / "p.jsonl", {"prompt": "a"}, row)
    with pytest.raises(
        TrainingError,
        match=(
            r"p.jsonl, line 2: character \d is \\ud83d|\\udc00, half of a surrogate pair: mend or"
            r" remove"
        ),
    ):
        list(Reader(tokenizer, 4096, "{}").read(path))
    if "response" not in row:
        with pytest.raises(PromptError, match=r"p.jsonl, line 2: character \d+ is \\u"):
            load_prompts(path, 8, tokenizer, 4096)


USER = {"role": "u", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [[USER]]}, "message 1 is a list: give an object with role and content"),
        ({"messages": [USER, 1]}, "message 2 is a number: give an object with role and content"),
        ({"messages": [{}]}, "message 1 has no role: give one, such as user"),
        ({"messages": [{"role": None, "content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "u", "content": None}]}, "message 1: content is null: give text"),
        ({"messages": [{"role": "u"}]}, "message 1: content is null: give text"),
        ({"messages": [{"role": "u", "content": {"a": 1}}]}, "message 1: content is an object"),
        (
            {"messages": [USER | {"content": ["a", {"type": "image_url", "image_url": {}}]}]},
            "message 1, part 2 is an object of type 'image_url': only text is taken, such as",
        ),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "message 1, part 1 is an object"),
        ({"messages": [USER | {"content": [1]}]}, "message 1, part 1 is a number"),
        ({"messages": []}, "messages is empty: give at least one message"),
        ({"messages": {}, "prompt": "a"}, "messages is an object: give at least one message"),
        ({"messages": "hi", "prompt": "a"}, "messages is a text: give at least one message"),
        ({"messages": [1], "prompt": "a"}, "message 1 is a number: give an object"),
    ],
)
def test_chats_that_are_none(tokenizer, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    """They reached the template, which wrote what it made of them, or were passed over for the
    prompt. Train and the commands that answer prompts refuse them in the same words."""
    path = lines(tmp_path / "p.jsonl", row)
    with pytest.raises(TrainingError) as found:
        list(Reader(tokenizer, 4096, "{}").read(path))
    assert f"{path}, line 1: {words}" in str(found.value)
    with pytest.raises(PromptError) as other:
        load_prompts(path, 1, tokenizer, 4096)
    assert str(other.value) == str(found.value)


def test_chats_that_are_some(tokenizer, tmp_path: Path) -> None:
    """An empty chat beside a prompt is none, as Parquet may give it; a call of tools has no
    text."""
    call = {"role": "a", "content": None, "tool_calls": [{"type": "function"}]}
    path = lines(tmp_path / "p.jsonl", {"messages": [], "prompt": "hi"}, {"messages": [USER, call]})
    found = [prompt.ids for prompt in Reader(tokenizer, 4096, "{}").read(path)]
    assert [tokenizer.decode(ids) for ids in found] == ["hi", "<u>hi\n<a>\n<a>"]
    assert load_prompts(path, 2, tokenizer, 4096) == found


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_of_tool_calls(tokenizer, tmp_path: Path, arguments: Any) -> None:
    """Objects, as vLLM's server gives them to a template: one that writes JSON of them wrote the
    client's text in quotes."""
    given = copy.deepcopy(tokenizer)
    given.chat_template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}, USER]
    (found,) = Reader(given, 4096, "{}").read(lines(tmp_path / "p.jsonl", {"messages": chat}))
    assert given.decode(found.ids) == '{"a": 1}'


def test_a_chat_that_ends_in_its_answer(tokenizer, tmp_path: Path) -> None:
    """As those to fine-tune on do: the answer was taken for a part of the question, without a
    word."""
    answer = {"role": "assistant", "content": "yo"}
    path = lines(
        tmp_path / "p.jsonl", {"messages": [USER, answer]}, {"messages": [USER, answer, USER]}
    )
    held_out = lines(tmp_path / "q.jsonl", {"prompt": "x"})
    found = split(
        Reader(tokenizer, 4096, "{}"), Data(prompts=(path,), held_out_prompts=held_out), 0
    )
    assert [tokenizer.decode(prompt.ids) for prompt in found.train] == [
        "<u>hi\n<a>",
        "<u>hi\n<assistant>yo\n<u>hi\n<a>",
    ]
    assert "1 chats without the answer at their end" in found.describe(8)


@pytest.mark.parametrize("given", [{"response": "z"}, {"response_token_ids": [5]}])
def test_a_chat_that_ends_in_an_answer_and_got_another(
    tokenizer, tmp_path: Path, given: dict[str, Any]
) -> None:
    """As the recorder keeps it: the message went and the response stayed, as the answer to another
    prompt than it was given to."""
    chat = [USER, {"role": "assistant", "content": "yo"}]
    (found,) = Reader(tokenizer, 4096, "{}").read(
        lines(tmp_path / "p.jsonl", {"messages": chat, **given})
    )
    assert tokenizer.decode(found.ids) == "<u>hi\n<assistant>yo\n<a>"
    assert found.response
    assert not found.answered


def test_an_answer_that_has_its_end(tokenizer, tmp_path: Path) -> None:
    """It got another end token after its own."""
    row = {"prompt": "a", "response": f"c{tokenizer.eos_token}"}
    (found,) = Reader(tokenizer, 4096, "{}").read(lines(tmp_path / "p.jsonl", row))
    assert found.response == [*tokenizer("c")["input_ids"], tokenizer.eos_token_id]


READS_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{%"
    " for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (TEMPLATE, [{"type": "text", "text": "zz"}], "<u>zz\n<a>"),
        (TEMPLATE, ["a", {"type": "text", "text": "b", "image_url": None}], "<u>a\nb\n<a>"),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content + '' }}"), ["a", "b"], "<u>a\nb\n<a>"),
        (READS_PARTS, ["a", "b"], "<u>ab"),
        (READS_PARTS.replace("{{ part.text }}", "{{ part }}"), ["a", "b"], "<u>a\nb"),
    ],
)
def test_content_in_parts(
    tokenizer, tmp_path: Path, template: str, content: list[Any], text: str
) -> None:
    """A template that writes content as text wrote Python's form of the list, without a word. Now
    it gets what vLLM's server gives it, and one that reads parts itself the parts."""
    given = copy.deepcopy(tokenizer)
    given.chat_template = template
    path = lines(tmp_path / "p.jsonl", {"messages": [USER | {"content": content}]})
    (found,) = Reader(given, 4096, "{}").read(path)
    assert given.decode(found.ids) == text
    assert load_prompts(path, 1, given, 4096) == [found.ids]


def test_a_byte_order_mark(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"prompt_token_ids": [5]}\n', encoding="utf-8")
    assert [prompt.ids for prompt in Reader(tokenizer, 4096, "{}").read(str(path))] == [[5]]


def test_truth_values_are_no_ids(tokenizer, tmp_path: Path) -> None:
    for row in (
        {"prompt_token_ids": [True, False]},
        {"prompt_token_ids": [5], "response_token_ids": [True]},
    ):
        with pytest.raises(TrainingError, match="token_ids is no list of ids below 4096"):
            list(Reader(tokenizer, 4096, "{}").read(lines(tmp_path / "p.jsonl", row)))


def test_a_response_past_the_positions(tokenizer, tmp_path: Path) -> None:
    """3,000 tokens were once taken for a target of 1,024 positions. A part of an answer is the
    target's text too, so it is cut, and counted."""
    rows = [
        {"prompt_token_ids": [9, i], "response_token_ids": [7] * n}
        for i, n in enumerate((3000, 1022, 1023, 5))
    ]
    reader = Reader(tokenizer, 4096, "{}", positions=1024)
    found = list(reader.read(lines(tmp_path / "p.jsonl", *rows)))
    assert [len(p.response) for p in found] == [1022, 1022, 1022, 5]
    assert [p.cut for p in found] == [True, False, True, False]
    parts = split(reader, Data(prompts=(str(tmp_path / "p.jsonl"),), held_out=1), 0)
    assert (
        f"{sum(p.cut for p in parts.train)} responses cut where the positions of target and"
        " drafter end" in parts.describe(8)
    )


def test_other_refusals(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no tokenizer, so give prompt_token_ids"):
        list(Reader(None, 4096, "{}").read(lines(tmp_path / "p.jsonl", {"prompt": "a"})))
    with pytest.raises(TrainingError, match="cannot be read"):
        list(Reader(tokenizer, 4096, "{}").read(str(tmp_path / "absent.jsonl")))
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(TrainingError, match="in UTF-8"):
        list(Reader(tokenizer, 4096, "{}").read(str(tmp_path / "latin")))
    with pytest.raises(TrainingError, match="give a JSON object"):
        Reader(tokenizer, 4096, "[1, 2]")


def test_the_split(tokenizer, tmp_path: Path) -> None:
    """Repeats and what is too long are left out and counted; a prompt keeps its side when the file
    is turned around."""
    rows = [{"prompt_token_ids": [9, i]} for i in range(40)]
    path = lines(tmp_path / "p.jsonl", *rows, rows[3], {"prompt_token_ids": [9] * 20})
    reader = Reader(tokenizer, 4096, "{}")
    found = split(reader, Data(prompts=(path,), held_out=10, max_prompt_tokens=8), 0)
    assert (
        found.describe(8)
        == "30 prompts to train on, 10 held out; left out: 1 repeated, 1 longer than"
        " max_prompt_tokens 8"
    )
    assert not {p.key for p in found.train} & {p.key for p in found.held_out}
    turned = split(
        reader, Data(prompts=(lines(tmp_path / "q.jsonl", *reversed(rows)),), held_out=10), 0
    )
    assert {p.key for p in turned.held_out} == {p.key for p in found.held_out}
    other = split(reader, Data(prompts=(path,), held_out=10), 1)
    assert {p.key for p in other.held_out} != {p.key for p in found.held_out}


def test_of_two_rows_with_one_prompt_the_answered_one_is_kept(tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt_token_ids": [1]},
        {"prompt_token_ids": [2], "response_token_ids": [5]},
        {"prompt_token_ids": [3]},
        {"prompt_token_ids": [1], "response_token_ids": [7]},
        {"prompt_token_ids": [2], "response_token_ids": [8]},
        {"prompt_token_ids": [2]},
    ]
    data = Data(prompts=(lines(tmp_path / "p.jsonl", *rows),), held_out=1)
    found = split(Reader(tokenizer, 4096, "{}"), data, 0)
    both = {tuple(p.ids): p.response for p in (*found.train, *found.held_out)}
    assert both == {(1,): [7], (2,): [5], (3,): None}
    assert found.repeated == 3


def test_held_out_prompts_of_their_own(tokenizer, tmp_path: Path) -> None:
    """One of them is also in the training file, and so is not trained on."""
    data = Data(
        prompts=(
            lines(tmp_path / "p.jsonl", {"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}),
        ),
        held_out_prompts=lines(tmp_path / "h.jsonl", {"prompt_token_ids": [2]}),
    )
    found = split(Reader(tokenizer, 4096, "{}"), data, 0)
    assert ([p.ids for p in found.train], [p.ids for p in found.held_out]) == ([[1]], [[2]])


def test_nothing_left(tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt_token_ids": [1] * 30})
    with pytest.raises(
        TrainingError, match=r"1 longer than max_prompt_tokens 8: at least one of each is needed"
    ):
        split(Reader(tokenizer, 4096, "{}"), Data(prompts=(path,), max_prompt_tokens=8), 0)


def test_engines_have_devices_of_their_own() -> None:
    assert device_sets(1, 2, None, 8) == [None]
    assert device_sets(2, 1, None, 0) == [None, None]
    assert device_sets(4, 2, None, 8) == ["0,1", "2,3", "4,5", "6,7"]
    assert device_sets(2, 1, "5,7", 2) == ["5", "7"]
    with pytest.raises(
        TrainingError,
        match="engines 8 x tensor_parallel_size 2 need 16 devices, and 8 are there: lower engines",
    ):
        device_sets(8, 2, None, 8)

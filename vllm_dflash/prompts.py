"""Prompts as token ids: a file's, or a few of our own. Chats go through the target's template, as
they are served.

pytest tests/unit/test_bench_workload.py tests/engine/test_doctor.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_dflash.json_text import loads
from vllm_dflash.regular import check_input

BUILT_IN = (
    (
        "Write a Python function that returns the n-th Fibonacci number without recursion, and"
        " explain each line."
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05 after two stops of 12 minutes each. How long"
        " was it moving? Show the steps."
    ),
    "def quicksort(values):\n    if len(values) < 2:\n        return values\n",
    (
        "List the planets of the solar system in order of their distance from the sun, with one"
        " fact about each."
    ),
    "import json\nfrom pathlib import Path\n\n\ndef load_settings(path: Path) -> dict:\n",
    "Explain in a short paragraph why the sky is blue and the sunset red.",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON",
    (
        "Rewrite this sentence in the passive voice, then in the future tense: The gardener waters"
        " the roses every morning."
    ),
)
"""Code, arithmetic and prose, for acceptance differs between them."""


class PromptError(ValueError):
    """The prompts cannot be used; the message names the line and the remedy."""


def load_prompts(path: str | None, count: int, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of the first ``count`` prompts of a file of JSON lines, or of the built-in ones.

    Chat targets get the built-in ones through their chat template, as they are served.

    Raises:
        PromptError: no file, a line that is none of the three forms, or text and no tokenizer.
    """
    if path is None:
        lines = [
            (asked(text, tokenizer), f"built-in prompts, line {n}")
            for n, text in enumerate(BUILT_IN, 1)
        ]
    else:
        lines = list(read_lines(path))
    return [token_ids(line, where, tokenizer, vocab_size) for line, where in lines[:count]]


def asked(text: str, tokenizer: Any) -> dict[str, Any]:
    """A line that asks ``text``: as a chat where the target is one."""
    if getattr(tokenizer, "chat_template", None):
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text}


def read_lines(path: str) -> Iterator[tuple[Any, str]]:
    """The objects of a file of JSON lines, each with where it stands; empty lines are none.

    Raises:
        PromptError: it cannot be read, is empty, or a line is no JSON; the line is named.
    """
    try:
        check_input(path)
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read ({error}): give a file of JSON lines") from None
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where, empty = f"{path}, line {number}", False
        try:
            yield loads(line), where
        except ValueError as error:
            raise PromptError(f"{where} is no JSON ({error}): give one object a line") from None
    if empty:
        raise PromptError(f'{path} is empty: give at least one line such as {{"prompt": "..."}}')


def token_ids(line: Any, where: str, tokenizer: Any, vocab_size: int) -> list[int]:
    """The token ids of one line with ``prompt``, ``messages`` or ``prompt_token_ids``; errors begin
    with ``where``, and are as above."""
    ids = line.get("prompt_token_ids") if isinstance(line, dict) else None
    if (
        isinstance(ids, list)
        and ids
        # True is a whole number to Python.
        and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    ):
        return ids
    messages, text = (
        (line.get("messages"), line.get("prompt")) if isinstance(line, dict) else (None, None)
    )
    if messages == [] and ids is None and not text:
        # A template would write its own opening to it, a system's message perhaps, and be answered.
        raise PromptError(
            f"{where}: messages is empty: give at least one message, such as"
            ' {"role": "user", "content": "..."}'
        )
    messages = messages or None
    if ids is not None or not (isinstance(messages, list) or (isinstance(text, str) and text)):
        raise PromptError(
            f"{where}: give prompt (text), messages (a chat) or prompt_token_ids (ids below"
            f" {vocab_size})"
        )
    if tokenizer is None:
        raise PromptError(
            f"{where}: the target has no tokenizer; give prompt_token_ids in --prompts"
        )
    special = not isinstance(messages, list)
    if isinstance(messages, list):
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # a template is a program of the target's author, and raises what it likes
            raise PromptError(
                f"{where}: the target's chat template refuses these messages ({error}): mend them,"
                " or give prompt"
            ) from None
    problem = surrogate(str(text))
    if problem is not None:
        raise PromptError(f"{where}: {problem}")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def surrogate(text: str) -> str | None:
    """What is wrong with a text that holds half of a surrogate pair, as JSON's escapes may write
    it: no tokenizer takes it. Else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"character {error.start + 1} is \\u{ord(text[error.start]):04x}, half of a surrogate"
            " pair: mend or remove it"
        )
    return None

"""Prompts as token ids: a file's, or a few of our own. Chats go through the target's template, as
they are served.

pytest tests/unit/test_bench_workload.py tests/engine/test_doctor.py
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.fields import json_type, shown
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
    text = line.get("prompt") if isinstance(line, dict) else None
    is_chat = ids is None and isinstance(line, dict) and has_chat(line)
    if not is_chat and (ids is not None or not (isinstance(text, str) and text)):
        raise PromptError(
            f"{where}: give prompt (text), messages (a chat) or prompt_token_ids (ids below"
            f" {vocab_size})"
        )
    if tokenizer is None:
        raise PromptError(
            f"{where}: the target has no tokenizer; give prompt_token_ids in --prompts"
        )
    if is_chat:
        return chat_ids(line["messages"], where, tokenizer)
    return list(tokenizer(_encodable(str(text), where))["input_ids"])


def has_chat(line: Mapping[str, Any]) -> bool:
    """Whether ``messages`` is given; an empty list beside a prompt is not."""
    messages = line.get("messages")
    return messages is not None and not (messages == [] and line.get("prompt"))


def chat_ids(
    messages: Any, where: str, tokenizer: Any, template_args: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a chat, up to the header of its answer; ``template_args`` goes to the template.

    Raises:
        PromptError: it is no chat, or the template refuses it; begins with ``where``.
    """
    if not isinstance(messages, list) or not messages:
        # A template would write its own opening to none, a system's message perhaps.
        state = "empty" if messages == [] else json_type(messages)
        raise PromptError(
            f"{where}: messages is {state}: give at least one message, such as"
            ' {"role": "user", "content": "..."}'
        )

    def render(messages: list[dict[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **template_args or {}
            )
        )

    messages = [_message(message, f"{where}: message {n}") for n, message in enumerate(messages, 1)]
    if any(isinstance(m["content"], list) for m in messages) and not _reads_parts(render):
        messages = [m | {"content": _joined(m["content"])} for m in messages]
    try:
        text = render(messages)
    except Exception as error:  # a template is a program of the target's author: it raises anything
        raise PromptError(
            f"{where}: the target's chat template refuses these messages ({error}): mend them, or"
            " give prompt as text"
        ) from None
    return list(tokenizer(_encodable(text, where), add_special_tokens=False)["input_ids"])


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message that is one: a template may write nothing, or Python's form, of another."""
    if not isinstance(message, dict):
        raise PromptError(f"{where} is {json_type(message)}: give an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{where} has no role: give one, such as user")
    if content is None and message.get("tool_calls"):
        content = ""  # as vLLM's server has it
    if isinstance(content, list):
        content = [_part(part, f"{where}, part {n}") for n, part in enumerate(content, 1)]
    elif not isinstance(content, str):
        raise PromptError(f"{where}: content is {json_type(content)}: give text")
    called = {"tool_calls": _tool_calls(message["tool_calls"], where)} if _calls(message) else {}
    return message | {"content": content} | called


def _calls(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls"))


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """An assistant's calls as a template is given them by vLLM's server: their arguments are
    objects, not the text that a client sends."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise PromptError(
            f'{where}: tool_calls are no list of {{"type": "function", "function": {{...}}}}: mend'
            " them, or leave them out"
        )
    return [call | {"function": _function(call["function"], where)} for call in calls]


def _function(function: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise PromptError(
            f"{where}: the arguments of the call of {shown(function.get('name'))} are no JSON"
            " object: mend them"
        )
    return function | {"arguments": arguments}


def _part(part: Any, where: str) -> dict[str, str]:
    """A part of a content, as a template is given it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
        raise PromptError(
            f"{where} is {json_type(part)} of type {shown(kind)}: only text is taken, such as"
            ' {"type": "text", "text": "..."}'
        )
    return {"type": "text", "text": part["text"]}


def _joined(content: str | list[dict[str, str]]) -> str:
    """Content as text: its parts with newlines between them, as vLLM's server joins them."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _reads_parts(render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a template goes through the parts of a content itself; vLLM's server joins them for
    one that does not."""
    try:
        text, parts = (
            render([{"role": "user", "content": content}])
            for content in ("x", [{"type": "text", "text": "x"}])
        )
    except Exception:  # as above
        return False
    return text == parts


def _encodable(text: str, where: str) -> str:
    problem = surrogate(text)
    if problem is not None:
        raise PromptError(f"{where}: {problem}")
    return text


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

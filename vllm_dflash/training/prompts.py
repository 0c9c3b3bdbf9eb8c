"""Reads prompts (JSON lines, or Hugging Face datasets on disk) as token ids, drops repeats, and
splits off the held-out ones.

The split is by a hash of the prompt's tokens, so a prompt stays on its side when files are added or
reordered.
Limits: token ids of all prompts in memory. Tests: ``pytest tests/unit/test_train_prompts.py``.
"""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dflash.fields import json_type
from vllm_dflash.json_text import loads
from vllm_dflash.prompts import PromptError, chat_ids, has_chat, surrogate
from vllm_dflash.records import object_of
from vllm_dflash.regular import check_input
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.tables import Data

_COLUMNS = (
    "prompt",
    "messages",
    "prompt_token_ids",
    "response",
    "response_token_ids",
    "finish_reason",
)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of its answer where the target has given one already."""

    ids: list[int]
    response: list[int] | None = None
    cut: bool = False
    """Whether there was more of the answer than target and drafter have positions for."""
    answered: bool = False
    """Whether the chat ended in an answer, which was left out: the target gives its own."""

    @property
    def key(self) -> bytes:
        """Tells prompts apart: eight bytes."""
        return _hash(self.ids)

    @property
    def response_key(self) -> bytes:
        """Tells answers apart, no answer among them: nine bytes."""
        return b"-" * 9 if self.response is None else b"+" + _hash(self.response)


def _hash(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest()


@dataclass
class Split:
    """What is trained on, what is held out, and what was left out of both and why."""

    train: list[Prompt] = field(default_factory=list)
    held_out: list[Prompt] = field(default_factory=list)
    repeated: int = 0
    too_long: int = 0

    def describe(self, limit: int) -> str:
        """One line for the user."""
        left = [
            f"{n} {what}"
            for n, what in (
                (self.repeated, "repeated"),
                (self.too_long, f"longer than max_prompt_tokens {limit}"),
            )
            if n
        ]
        text = f"{len(self.train)} prompts to train on, {len(self.held_out)} held out" + (
            f"; left out: {', '.join(left)}" if left else ""
        )
        for count, what in (
            (
                sum(prompt.cut for prompt in self.train),
                "responses cut where the positions of target and drafter end",
            ),
            (
                sum(prompt.answered for prompt in self.train),
                "chats without the answer at their end: the target gives its own",
            ),
        ):
            text += f"; {count} {what}" if count else ""
        return text


class Reader:
    """Turns lines into token ids the way the target is served: chats through its template, texts
    with its special tokens."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        chat_template_kwargs: str,
        positions: int = sys.maxsize,
    ) -> None:
        """``positions``: what target and drafter reach to; longer answers are cut there, for a part
        of one is the target's text too."""
        self.tokenizer, self.vocab_size, self.positions = tokenizer, vocab_size, positions
        try:
            self.template_args = object_of(chat_template_kwargs)
        except ValueError:
            raise TrainingError(
                f"chat_template_kwargs is {chat_template_kwargs!r}: give a JSON object"
            ) from None

    def read(self, path: str) -> Iterator[Prompt]:
        """Every prompt of a file or dataset, in its order.

        Raises:
            TrainingError: it is absent or empty, or a line is broken; the line is named.
        """
        empty = True
        for number, row in self._rows(Path(path)):
            empty = False
            yield self._prompt(row, f"{path}, line {number}")
        if empty:
            raise TrainingError(
                f'{path} is empty: give at least one line such as {{"prompt": "..."}}'
            )

    def _rows(self, path: Path) -> Iterator[tuple[int, Any]]:
        if path.is_dir():
            yield from enumerate(_dataset(path), 1)
            return
        try:
            check_input(path)
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _json(line, f"{path}, line {number}")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from None

    def _prompt(self, row: Any, where: str) -> Prompt:
        if not isinstance(row, dict):
            raise TrainingError(
                f"{where}: it holds {json_type(row)}, not an object with prompt, messages or"
                " prompt_token_ids"
            )
        given = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
        answered = False
        if "prompt_token_ids" in given:
            ids = self._ids(given["prompt_token_ids"], "prompt_token_ids", where)
        elif has_chat(given):
            # Another answer beside it was given to the chat as it is.
            has_response = given.get("response") or "response_token_ids" in given
            answered = not has_response and _is_answered(given["messages"])
            ids = self.chat(given["messages"][:-1] if answered else given["messages"], where)
        elif isinstance(given.get("prompt"), str) and given["prompt"]:
            ids = list(self._known(where)(encodable(given["prompt"], where))["input_ids"])
        else:
            raise TrainingError(
                f"{where}: give prompt (text), messages (a chat) or prompt_token_ids (a list of ids"
                f" below {self.vocab_size})"
            )
        if not ids:
            raise TrainingError(f"{where}: the prompt has no tokens: remove the line")
        response, room = self._response(given, where), max(0, self.positions - len(ids))
        return Prompt(
            ids,
            None if response is None else response[:room],
            response is not None and len(response) > room,
            answered,
        )

    def _response(self, given: dict[str, Any], where: str) -> list[int] | None:
        if "response_token_ids" in given:
            return self._ids(given["response_token_ids"], "response_token_ids", where)
        response = given.get("response", "")
        if not isinstance(response, str):
            raise TrainingError(
                f"{where}: response is {json_type(response)}: give the answer's text, or"
                " response_token_ids"
            )
        if not response:
            return None
        tokenizer, reason = self._known(where), given.get("finish_reason", "stop")
        if not isinstance(reason, str):
            raise TrainingError(
                f"{where}: finish_reason is {json_type(reason)}: give stop, or length where the"
                " answer was cut"
            )
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        text = encodable(response, where)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if reason == "length" or ids[-1:] == end else ids + end

    def _ids(self, ids: Any, name: str, where: str) -> list[int]:
        good = isinstance(ids, Sequence) and all(
            # True is a whole number to Python.
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.vocab_size
            for i in ids
        )
        if not good or not ids:
            raise TrainingError(
                f"{where}: {name} is no list of ids below {self.vocab_size}: tokenize it with the"
                " target's tokenizer"
            )
        return list(ids)

    def chat(self, messages: Any, where: str) -> list[int]:
        """Token ids of a chat, as ``chat_ids``, whose refusals come as TrainingError."""
        try:
            return chat_ids(messages, where, self._known(where), self.template_args)
        except PromptError as error:
            raise TrainingError(str(error)) from None

    def _known(self, where: str) -> Any:
        if self.tokenizer is None:
            raise TrainingError(
                f"{where}: the target has no tokenizer, so give prompt_token_ids and"
                " response_token_ids"
            )
        return self.tokenizer


def _is_answered(messages: Any) -> bool:
    """Whether a chat ends in the assistant's message, as those to fine-tune on do."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def check_files(data: Data) -> None:
    """Refuses prompts that cannot be opened, before anything is begun with them.

    Raises:
        TrainingError: a file is absent, not this user's to read, or no regular file.
    """
    for name in filter(None, (*data.files, data.held_out_prompts)):
        path = Path(name)
        try:
            if not path.is_dir():
                check_input(path)
                path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path} cannot be read ({error}): give a file of JSON lines in UTF-8, or a dataset's"
        " folder"
    )


def split(reader: Reader, data: Data, seed: int) -> Split:
    """Reads all files, drops repeats and what is too long, and holds out ``data.held_out`` prompts.

    Raises:
        TrainingError: as ``Reader.read``, or too little is left.
    """
    out, seen = Split(), set[bytes]()

    def kept(paths: Iterable[str]) -> list[Prompt]:
        """In their order; of prompts that repeat each other the first that has an answer."""
        found: dict[bytes, Prompt] = {}
        for prompt in itertools.chain.from_iterable(map(reader.read, paths)):
            out.repeated += prompt.key in seen
            out.too_long += len(prompt.ids) > data.max_prompt_tokens and prompt.key not in seen
            is_new = prompt.key not in seen and len(prompt.ids) <= data.max_prompt_tokens
            if is_new or (prompt.key in found and found[prompt.key].response is None):
                found[prompt.key] = prompt
            seen.add(prompt.key)
        return list(found.values())

    if data.held_out_prompts is not None:
        out.held_out = kept([data.held_out_prompts])[: data.held_out]
    prompts = kept(data.files)
    if data.held_out_prompts is None:
        order = sorted(
            range(len(prompts)),
            key=lambda i: hashlib.blake2b(prompts[i].key, salt=seed.to_bytes(8, "little")).digest(),
        )
        chosen = set(order[: min(data.held_out, len(prompts) // 2)])
        out.held_out = [prompts[i] for i in sorted(chosen)]
        prompts = [p for i, p in enumerate(prompts) if i not in chosen]
    out.train = prompts[: data.max_prompts]
    if not out.train or not out.held_out:
        raise TrainingError(
            f"{out.describe(data.max_prompt_tokens)}: at least one of each is needed; give more"
            " prompts" + (", or raise max_prompt_tokens" if out.too_long else "")
        )
    return out


def encodable(text: str, where: str) -> str:
    """``text``, which a tokenizer must be able to take as UTF-8.

    Raises:
        TrainingError: it holds half of a surrogate pair, as JSON's escapes may write it.
    """
    problem = surrogate(text)
    if problem is not None:
        raise TrainingError(f"{where}: {problem}")
    return text


def _json(line: str, where: str) -> Any:
    try:
        return loads(line)
    except ValueError as error:
        raise TrainingError(f"{where} is not JSON ({error}): mend or remove the line") from None


def _dataset(path: Path) -> Iterator[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise TrainingError(
            f"{path} is a folder, and reading datasets needs their library: pip install datasets,"
            " or give JSON lines"
        ) from None
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} is no dataset of save_to_disk ({error}): give such a folder, or a file of JSON"
            " lines"
        ) from None
    if not isinstance(found, Dataset):
        raise TrainingError(
            f"{path} holds the splits {', '.join(found)}: give the folder of one, such as"
            f" {path / next(iter(found))}"
        )
    yield from found

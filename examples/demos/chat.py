"""The demo on SmolLM2: questions through its chat template, one at a time and eight at a time,
without and with the drafter, in turn; then a chat completion over HTTP.

    .venv/bin/python examples/demo.py --pair smollm2 --draft FOLDER
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.kinds import kind_of
from vllm_dflash.progress import Progress
from vllm_dflash.prompts import read_lines, token_ids

from . import engines, race, server
from .asking import Answer, ask
from .choice import CHAT, EXAMPLES, Pair
from .ports import free_port

TOKENS, ROUNDS = 64, 1
TOGETHER = 8
KINDS = {"code": "Python tasks", "everyday": "everyday questions"}
PLAIN = "plain"
_WARM_UP_TOKENS = 16
"""Of plain decoding, which has nothing to learn; a controller has, and gets whole answers."""


@dataclass(frozen=True)
class Question:
    """A line of the prompts file."""

    kind: str
    text: str
    token_ids: list[int]


@dataclass
class Part:
    """What was measured of one kind of question under one load; by method, a value a round."""

    kind: str
    at_a_time: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """Those of the last round."""
    drafts: int = 0
    accepted: int = 0
    differing: int = 0
    """Answers that were not the same in both methods, over all rounds."""

    @property
    def tokens(self) -> int:
        """Of a round."""
        return sum(len(answer.token_ids) for answer in self.answers[PLAIN])

    @property
    def ratio(self) -> float:
        """Median over the rounds of plain decoding's seconds over the other method's."""
        plain, other = self.seconds.values()
        return statistics.median(p / o for p, o in zip(plain, other, strict=True))

    @property
    def line(self) -> str:
        """Its figures."""
        load = "one at a time" if self.at_a_time == 1 else f"{self.at_a_time} at a time"
        speeds = ", ".join(
            f"{name} {self.tokens / statistics.median(seconds):.1f} tokens/s"
            for name, seconds in self.seconds.items()
        )
        total = len(self.answers[PLAIN]) * len(self.seconds[PLAIN])
        return (
            f"{KINDS[self.kind]}, {load}: {speeds}, ratio {self.ratio:.2f} x,"
            f" {tau(self.drafts, self.accepted)}, identical {total - self.differing} of {total}"
        )


def tau(drafts: float, accepted: float) -> str:
    """Tokens that a draft brought: those accepted, and the target's own after them."""
    return f"tau {1 + accepted / drafts:.2f}" if drafts else "nothing drafted"


def run(pair: Pair, args: argparse.Namespace) -> int:
    """Both parts; the exit status: 0 where all outputs are identical."""
    try:
        config = DrafterConfig.from_pretrained(pair.drafter)
    except DrafterConfigError as error:
        raise SystemExit(f"demo: {error}") from None
    label, console = kind_of(config).label, Console(highlight=False)
    k = args.speculative_tokens or config.max_speculative_tokens
    speculative = engines.speculative_config(pair.drafter, k)
    tokens, rounds = args.tokens or TOKENS, args.rounds or ROUNDS
    llms = load(pair.target, label, speculative, adaptive=not args.whole_drafts)
    questions = read(llms[PLAIN], args.prompts)
    warm_up(llms, questions, tokens)
    console.print(
        f"\nSmolLM2-135M-Instruct in float32, greedily; at most {tokens} tokens an answer, and {k}"
        f" in a {label} draft. Times include the reading of the question.",
        soft_wrap=True,
    )
    parts = []
    for at_a_time in (1, TOGETHER):
        for kind in KINDS:
            asked = [question for question in questions if question.kind == kind]
            part = measure(llms, kind, asked, at_a_time, tokens, rounds)
            parts.append(part)
            if at_a_time == 1:
                first = {name: answers[0] for name, answers in part.answers.items()}
                race.show(console, asked[0].text, first)
            console.print(f"\n{part.line}", soft_wrap=True)
    differing = sum(part.differing for part in parts)
    if not args.no_serve:
        known = parts[0].answers[PLAIN][0].text
        differing += not serve(pair, speculative, tokens, questions[0], known)
    if differing:
        raise SystemExit(
            "outputs differ: speculation must be lossless in float32; please report this with the"
            " versions that `vllm-dflash status` prints"
        )
    print("\nAll outputs are identical.")
    if parts[0].ratio < args.at_least:
        raise SystemExit(f"the ratio of {KINDS[parts[0].kind]} is below {args.at_least}")
    return 0


def load(
    target: Path, label: str, speculative: dict[str, Any], *, adaptive: bool
) -> dict[str, Any]:
    """An engine a method; without a prefix cache, for the same questions come again."""
    llms = {}
    methods = {PLAIN: (None, False), label: (speculative, adaptive)}
    for name, (config, learns) in Progress(methods.items(), desc="loading", unit=" engines"):
        llms[name] = engines.engine(target, config, adaptive=learns, enable_prefix_caching=False)
    return llms


def read(llm: Any, most: int | None) -> list[Question]:
    """The questions of the prompts file, ``most`` of each kind at most."""
    tokenizer, vocab_size = llm.get_tokenizer(), llm.model_config.get_vocab_size()
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for line, where in read_lines(str(CHAT / "prompts.jsonl")):
        ids = token_ids(line, where, tokenizer, vocab_size)
        found[line["kind"]].append(Question(line["kind"], line["messages"][-1]["content"], ids))
    return [question for questions in found.values() for question in questions[:most]]


def warm_up(llms: dict[str, Any], questions: Sequence[Question], tokens: int) -> None:
    """One question of each kind alone, then a full load; not measured.

    With a number of requests that is new the controller tries what it does not know: a short answer
    would be all trials.
    """
    alone = [next(q for q in questions if q.kind == kind).token_ids for kind in KINDS]
    loads = [*([ids] for ids in alone), list(take([q.token_ids for q in questions], TOGETHER))]
    with Progress(total=len(llms) * len(loads), desc="warming up") as bar:
        for name, llm in llms.items():
            for prompts in loads:
                ask(llm, prompts, min(tokens, _WARM_UP_TOKENS) if name == PLAIN else tokens)
                bar.update()


def take(entries: Sequence[Any], count: int) -> Iterator[Any]:
    """``count`` of them, from the start again where there are fewer."""
    return (entries[i % len(entries)] for i in range(count))


def measure(
    llms: dict[str, Any],
    kind: str,
    questions: Sequence[Question],
    at_a_time: int,
    tokens: int,
    rounds: int,
) -> Part:
    """The methods in turn, question by question or load by load, each time another one first, so
    that a machine that slows down slows down both."""
    prompts = [question.token_ids for question in questions]
    loads = [[ids] for ids in prompts] if at_a_time == 1 else [list(take(prompts, at_a_time))]
    part = Part(kind, at_a_time, {name: [] for name in llms})
    drafted = list(llms.values())[-1]
    before = engines.counters(drafted)
    what = f"{KINDS[kind]}, {at_a_time} at a time"
    with Progress(total=rounds * len(loads) * len(llms), desc=what) as bar:
        for _ in range(rounds):
            seconds = dict.fromkeys(llms, 0.0)
            part.answers = {name: [] for name in llms}
            for i, load in enumerate(loads):
                for name in list(llms) if i % 2 == 0 else reversed(llms):
                    took, answers = ask(llms[name], load, tokens)
                    seconds[name] += took
                    part.answers[name] += answers
                    bar.update()
            plain, other = part.answers.values()
            part.differing += sum(
                p.token_ids != o.token_ids for p, o in zip(plain, other, strict=True)
            )
            for name in llms:
                part.seconds[name].append(seconds[name])
    after = engines.counters(drafted)
    part.drafts = after["num_drafts"] - before["num_drafts"]
    part.accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    return part


def serve(
    pair: Pair, speculative: dict[str, Any], tokens: int, question: Question, known: str
) -> bool:
    """A real server and a chat completion over HTTP; whether its answer is ``known``."""
    port = free_port()
    command = server.command(str(pair.target), speculative, port, "--dtype", "float32")
    folder = '"$(python -m vllm_dflash.smollm2)"'
    shown = [f"'{c}'" if c.startswith("{") else c for c in ["vllm", *command[1:]]]
    shown = [folder if c == str(pair.target) else c for c in shown]
    print("\nNow as a server:\n\n    " + " ".join(shown).replace(f"{EXAMPLES.parent}/", "") + "\n")
    body = {
        "model": server.NAME,
        "messages": [{"role": "user", "content": question.text}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    with server.running(command, port):
        answer = json.loads(server.fetch(port, "/v1/chat/completions", body))
        drafts, accepted = server.drafts(port)
    text = answer["choices"][0]["message"]["content"]
    print("    " + str(race.readable(text)).replace("\n", "\n    "))
    same = "the same text as above" if text == known else "ANOTHER text than above"
    print(
        f"\nPOST /v1/chat/completions: {answer['usage']['completion_tokens']} tokens,"
        f" {tau(drafts, accepted)}, {same}"
    )
    return bool(text == known)

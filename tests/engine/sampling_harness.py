"""Starts ``sampling_worker.py``: engines that answer requests with any sampling parameters, several
engines a process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.harness import run_worker

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""The models are so small that a second thread costs more than it does, above all beside other
work."""


@dataclass(frozen=True)
class Ask:
    """One call of ``LLM.generate``."""

    prompts: Sequence[list[int] | str]
    params: dict[str, Any] | Sequence[dict[str, Any]]
    """Fields of ``SamplingParams``, for all prompts or one a prompt; ``structured_outputs`` as a
    dictionary too."""
    broken: str | None = None
    """A key of ``broken_rules.RULES``: the rule of acceptance that is broken on purpose."""
    draft_probs: bool = False
    """Whether to count drafted tokens against the proposer's probabilities."""
    alone: bool = False
    """Not to be asked together with others."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "alone"}


@dataclass(frozen=True)
class Engine:
    """One engine and what it is asked, in order."""

    target: Path
    drafter: Path | None
    asks: Sequence[Ask]
    num_speculative_tokens: int = 7
    speculative: dict[str, Any] = field(default_factory=dict)
    """Further fields of the speculative config."""
    args: dict[str, Any] = field(default_factory=dict)
    together: bool = False
    """Whether what need not be asked alone is asked in one call, of up to 64 requests a step: for
    an engine that only says what a request's answer is. Those answers have no counters."""

    def to_json(self) -> dict[str, Any]:
        # Every draft whole and verified whole, unless a test says otherwise: the controller may
        # choose not to draft at all.
        args: dict[str, Any] = {
            "model": str(self.target),
            "additional_config": {"dflash": {"adaptive": False}},
        } | self.args
        if self.drafter is not None:
            args["speculative_config"] = {
                "method": "dflash",
                "model": str(self.drafter),
                "num_speculative_tokens": self.num_speculative_tokens,
            } | self.speculative
        if self.together:
            args = {"max_num_seqs": 64} | args
        return {"args": args, "asks": [ask.to_json() for ask in self._calls()]}

    def _calls(self) -> list[Ask]:
        shared = self._shared()
        if not shared:
            return list(self.asks)
        assert not any(ask.broken or ask.draft_probs for ask in shared)
        params = [
            each
            for ask in shared
            for each in (
                [ask.params] * len(ask.prompts) if isinstance(ask.params, dict) else ask.params
            )
        ]
        together = Ask([prompt for ask in shared for prompt in ask.prompts], params)
        return [together, *(ask for ask in self.asks if ask.alone)]

    def _shared(self) -> list[Ask]:
        return [ask for ask in self.asks if self.together and not ask.alone]

    def answers(self, answers: Sequence["Answer"]) -> list["Answer"]:
        """What each was answered, of the answers to the calls."""
        shared, rest = self._shared(), iter(answers)
        if not shared:
            return list(answers)
        answer, at = next(rest), 0
        assert answer.error or len(answer.completions) == sum(len(ask.prompts) for ask in shared)
        found = []
        for ask in self.asks:
            if ask.alone:
                found.append(next(rest))
                continue
            part = slice(at, at := at + len(ask.prompts))
            found.append(
                Answer(
                    answer.completions[part], answer.prompt_logprobs[part], {}, answer.error, None
                )
            )
        return found


@dataclass(frozen=True)
class Answer:
    """What came back for one ``Ask``; ``completions`` holds a list a prompt, of ``n`` dictionaries
    each."""

    completions: list[list[dict[str, Any]]]
    prompt_logprobs: list[Any]
    counters: dict[str, Any]
    error: str | None
    draft_probs: dict[str, Any] | None

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Token ids by prompt and completion."""
        return [[c["token_ids"] for c in completions] for completions in self.completions]

    @property
    def accepted_share(self) -> float:
        """Accepted draft tokens a draft."""
        return self.counters["accepted"] / self.counters["drafts"]


def run(engines: Sequence[Engine]) -> list[list[Answer]]:
    """Runs the engines one after the other in one new process; returns each one's answers."""
    reports = run_worker(
        "sampling_worker.py", [engine.to_json() for engine in engines], ENVIRONMENT
    )
    return [
        engine.answers([Answer(**answer) for answer in answers])
        for engine, answers in zip(engines, reports, strict=True)
    ]

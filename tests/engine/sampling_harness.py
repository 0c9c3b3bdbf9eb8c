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
        return {"args": args, "asks": [vars(ask) for ask in self.asks]}


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
    return [[Answer(**answer) for answer in answers] for answers in reports]

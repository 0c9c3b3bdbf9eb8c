"""Questions put to an engine, and its answers with the time of each piece of text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What a request was answered."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[tuple[float, int, str]] = field(default_factory=list)
    """Seconds since it was asked, tokens up to then, and the text that came."""

    def add(self, seconds: float, token_ids: Sequence[int], text: str) -> None:
        """What came in one step."""
        self.token_ids += token_ids
        self.pieces.append((seconds, len(self.token_ids), text))

    @property
    def seconds(self) -> float:
        """Until its last token."""
        return self.pieces[-1][0] if self.pieces else 0.0

    @property
    def text(self) -> str:
        return self.by(self.seconds)[1]

    def by(self, seconds: float) -> tuple[int, str]:
        """Tokens and text that were there after so many seconds."""
        there = [piece for piece in self.pieces if piece[0] <= seconds]
        return (there[-1][1] if there else 0), "".join(piece[2] for piece in there)


def ask(llm: Any, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[Answer]]:
    """All prompts at once, greedily; seconds until the last has its answer, and the answers.

    Args:
        prompts: token ids.
        tokens: of an answer, at most; it ends before where the model ends it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(temperature=0, max_tokens=tokens, output_kind=RequestOutputKind.DELTA)
    engine, answers = llm.llm_engine, [Answer() for _ in prompts]
    began = time.perf_counter()
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": list(ids)}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            piece = output.outputs[0]
            answers[int(output.request_id)].add(
                time.perf_counter() - began, piece.token_ids, piece.text
            )
    return time.perf_counter() - began, answers

"""Tokens drawn from logits on a CPU: by inverting the distribution function, and by vLLM's own
numbers for requests with a seed. Pure.

vLLM's CPU sampler makes a Gumbel variable for each token of the vocabulary, 25 us a row of 4,096;
two uniform numbers a row say as much. Its own numbers remain where a request has a seed, for whose
output it is answerable.

    pytest tests/unit/test_sampling.py tests/engine/test_sampling.py
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

_MOST_PARTS = 512
_BELOW_ONE = 1 - 2**-52
"""A uniform number below 1 times this, times any total, is below the total after rounding."""


def draw_tokens(logits: torch.Tensor) -> torch.Tensor:
    """A token of each row's softmax, independently, by torch's global generator.

    A row's vocabulary is cut into parts: one number chooses the part by its share, another the
    token in it, so that only sums are taken over all of it. Probabilities are float32, their sums
    over parts and tokens float64: a token of probability 0 is never drawn.

    Args:
        logits: [R, V] float32; -inf for what is not to be drawn.

    Returns:
        [R] int64.
    """
    rows, vocab = logits.shape
    parts = logits.softmax(-1).view(rows, _num_parts(vocab), -1)
    uniform = torch.rand(rows, 2, dtype=torch.float64).numpy() * _BELOW_ONE
    # Few numbers from here on: an operator of numpy's begins sooner than one of torch's.
    part = _invert(parts.sum(-1).numpy(), uniform[:, :1])
    token = _invert(parts.numpy()[np.arange(rows), part], uniform[:, 1:])
    return torch.from_numpy(part * parts.shape[2] + token)


def _invert(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """[R] int64: for each row of ``weights`` [R, n] the first entry up to which they sum to more
    than ``uniform`` [R, 1] of the total."""
    sums = weights.cumsum(-1, dtype=np.float64)
    found = (sums <= uniform * sums[:, -1:]).sum(-1)
    return np.minimum(found, weights.shape[1] - 1)  # where logits are no numbers


@cache
def _num_parts(vocab: int) -> int:
    """The largest divisor of the vocabulary that is not above ``_MOST_PARTS`` or its root."""
    return max(n for n in range(1, _MOST_PARTS + 1) if vocab % n == 0 and n * n <= vocab)


_BOUND = 2**31
"""vLLM's CPU sampler seeds a row's noise with a number below it."""


@dataclass(frozen=True)
class Seeded:
    """A request with a seed, in one step."""

    request_id: str
    seed: int
    """Of the generator that vLLM has made for it; nothing was drawn by that one."""
    place: int
    """Of the output token that comes next, counted from 0."""


class SeedDraws:
    """The numbers that vLLM draws one after the other for a request with a seed, by the place of
    the output token that each is for."""

    def __init__(self) -> None:
        self._drawn: dict[str, tuple[int, torch.Generator, list[int]]] = {}
        self._draw = torch.empty(1, dtype=torch.long)

    def at(self, request_id: str, seed: int, places: range) -> list[int]:
        """The draws for these output tokens of a request, counted from 0."""
        known = self._drawn.get(request_id)
        if known is None or known[0] != seed:
            known = self._drawn[request_id] = (seed, torch.Generator().manual_seed(seed), [])
        _, generator, drawn = known
        while len(drawn) < places.stop:
            # One at a time, as vLLM draws them: a generator gives other numbers when it is asked
            # for several.
            drawn.append(self._draw.random_(0, _BOUND, generator=generator).item())
        return drawn[places.start : places.stop]

    def forget_all_but(self, running: Container[str]) -> None:
        """Drops requests that have ended."""
        for request_id in [name for name in self._drawn if name not in running]:
            del self._drawn[request_id]


class DrawsInTurn:
    """Tokens drawn by vLLM's own sampler where it is another than the kernel that ``SeedDraws``
    knows: it may draw any amount of a request's generator for a token, so a row's draw begins where
    that of the row before it ended. One call for each place of the longest draft."""

    def __init__(self, sampler: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """``sampler``: as vLLM's ``TopKTopPSampler``."""
        self._sampler = sampler
        self._states: dict[str, tuple[int, dict[int, torch.Tensor]]] = {}
        """By request its seed, and its generator's state before the token of each place that may
        come next."""

    def draw(
        self,
        logits: torch.Tensor,
        num_drafts: Sequence[int],
        seeded: Mapping[int, Seeded],
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
    ) -> torch.Tensor:
        """A token of each row.

        Args:
            logits: [R, V] float32, a request's rows one after the other; stays as it is.
            num_drafts: [B]; a request has a row for each draft and one more.
            seeded: by request, those with a seed.
            top_k, top_p: [R], or None where no request has one.

        Returns:
            [R] int64.
        """
        first, total = [], 0
        for count in num_drafts:
            first.append(total)
            total += count + 1
        generators = {i: self._generator(s, logits.shape[1]) for i, s in seeded.items()}
        sampled = torch.empty(total, dtype=torch.int64)
        for depth in range(max(num_drafts) + 1):
            requests = [i for i, count in enumerate(num_drafts) if count >= depth]
            rows = torch.tensor([first[i] + depth for i in requests])
            own = {at: generators[i] for at, i in enumerate(requests) if i in generators}
            settings = (None if s is None else s[rows] for s in (top_k, top_p))
            sampled[rows] = self._sampler(logits[rows], own, *settings)[0].long()
            for i in requests:
                if i in generators:
                    states = self._states[seeded[i].request_id][1]
                    states[seeded[i].place + depth + 1] = generators[i].get_state()
        return sampled

    def _generator(self, request: Seeded, vocab: int) -> torch.Generator:
        """As vLLM's sampler finds it before the request's next token; later states are dropped."""
        seed, states = self._states.get(request.request_id, (None, {}))
        generator = torch.Generator().manual_seed(request.seed)
        at = 0
        if seed == request.seed:
            at = max((place for place in states if place <= request.place), default=0)
            if at in states:
                generator.set_state(states[at])
        for _ in range(at, request.place):  # of a request that was not seen from its start
            self._sampler(torch.zeros(1, vocab), {0: generator}, None, None)
        states = {request.place: generator.get_state()}
        self._states[request.request_id] = request.seed, states
        return generator

    def forget_all_but(self, running: Container[str]) -> None:
        """Drops requests that have ended."""
        for request_id in [name for name in self._states if name not in running]:
            del self._states[request_id]


def int32(values: Sequence[Any]) -> torch.Tensor:
    """Token ids or counts, in lists of any depth, as a tensor: of a few, numpy makes one in a third
    of the time that ``torch.tensor`` takes."""
    return torch.from_numpy(np.array(values, dtype=np.int32))

"""Tokens drawn from logits on a CPU: by inverting the distribution function, and the noise of
requests with a seed. Pure.

vLLM's CPU sampler makes a Gumbel variable for each token of the vocabulary, 25 us a row of 4,096;
two uniform numbers a row say as much. Its own numbers remain where a request has a seed, for whose
output it is answerable.

    pytest tests/unit/test_sampling.py tests/engine/test_sampling.py
"""

from collections.abc import Container
from functools import cache

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

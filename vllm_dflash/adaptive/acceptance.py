"""How likely the draft token at a position is accepted, given that all before it were: over all requests, and for each. Pure.

pytest tests/unit/test_adaptive.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PRIOR = 0.6, 4.0
"""Before anything was seen: this rate, with the weight of so many tokens."""
_MEMORY = 500.0
"""Drafts that count; older ones fade."""
_REQUEST_MEMORY, _REQUEST_WEIGHT = 64.0, 6.0
"""Of one request: the expected accepted tokens that count, and how many stand for what all requests do."""
_MOST = 0.99


@dataclass
class _Request:
    accepted: float = 0.0
    expected: float = 0.0

    @property
    def factor(self) -> float:
        return (self.accepted + _REQUEST_WEIGHT) / (self.expected + _REQUEST_WEIGHT)


class Acceptance:
    """Conditional acceptance rates of up to ``max_draft`` positions, with a factor for each request."""

    def __init__(self, max_draft: int) -> None:
        rate, weight = _PRIOR
        self._accepted, self._reached = [rate * weight] * max_draft, [weight] * max_draft
        self._requests: dict[str, _Request] = {}

    @property
    def rates(self) -> list[float]:
        """[K]: probability that position i is accepted once all before it are, over all requests."""
        return [accepted / reached for accepted, reached in zip(self._accepted, self._reached, strict=True)]

    def observe(self, request: str, verified: int, accepted: int) -> None:
        """Takes in that of ``verified`` draft tokens of a request the first ``accepted`` were accepted."""
        fade, expected = 1 - 1 / _MEMORY, 0.0
        # Only what is reached fades, so that a position that is seldom reached keeps its evidence for as long.
        for i in range(min(accepted + 1, verified)):
            expected += self._accepted[i] / self._reached[i]
            self._accepted[i] = self._accepted[i] * fade + (i < accepted)
            self._reached[i] = self._reached[i] * fade + 1
        if expected:
            own = self._requests.setdefault(request, _Request())
            keep = min(1.0, _REQUEST_MEMORY / max(own.expected, 1e-9))
            own.accepted, own.expected = own.accepted * keep + accepted, own.expected * keep + expected

    def survival(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [B, K]: probability that each request's draft is accepted up to and with position i."""
        none = _Request()
        factors = np.array([self._requests.get(request, none).factor for request in requests])
        return np.cumprod(np.minimum(np.outer(factors, self.rates), _MOST), axis=1)

    def lengths(self, requests: Sequence[str], num_draft_tokens: int, threshold: float) -> dict[str, int]:
        """Of each request's draft tokens, how many are accepted with a probability above ``threshold``."""
        rates, none, found = self.rates[:num_draft_tokens], _Request(), {}
        for request in requests:
            factor, survival, length = self._requests.get(request, none).factor, 1.0, 0
            for rate in rates:
                survival *= min(rate * factor, _MOST)
                if survival <= threshold:
                    break
                length += 1
            found[request] = length
        return found

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._requests.pop(request, None)

"""How likely a draft token is accepted, given that all before it were. Pure.

The drafter's confidence in it, times three factors: what confidences are worth, what its position
is, and what its request is. Each is accepted tokens over expected ones, older ones fading, and the
first two are known apart for groups of requests: of a sampled one drafts are accepted less than of
a greedy one. Where no confidences are known, the usual one stands for each. Steps are learned from
when something is to be expected, many at once: an array's arithmetic costs as little as one
number's.

    pytest tests/unit/test_adaptive.py
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning

Said = Sequence[float] | None
"""The probability that the drafter gives each token of a draft, where known."""
Confidences = Mapping[str, Sequence[float]] | None
"""By request, of its draft; None where none are known."""
GroupOf = Callable[[str], Hashable]
"""Which of a request's kind are accepted alike, and have the same limit."""
LimitOf = Callable[[str], int] | None
"""The draft tokens that a request may have; None for no limit."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""


@dataclass(eq=False)
class _Request:
    """One request's group, and the factor that is its own."""

    group: int
    factor: float = 1.0


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions, K. Arrays by group
    are [G, 1] or [G, K], NaN at positions that its requests may not have."""

    def __init__(self, max_draft: int, tuning: Tuning, group: GroupOf, limit: LimitOf) -> None:
        self._tuning, self._group, self._limit = tuning, group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, int] = {}
        self._requests: dict[str, _Request] = {}
        self._usual, self._none = [tuning.usual] * max_draft, [np.nan] * max_draft
        self._worth = self._weight = np.empty((0, 1))
        """Of a confidence, and the expected tokens that this is based on."""
        self._positions = self._weights = np.empty((0, max_draft))
        """The same of each position."""
        self._rates = np.empty((0, max_draft))
        """Both factors' product."""
        self.recent: list[deque[Sequence[float]]] = []
        """By group, confidences of the last drafts, [K] each."""
        self._outcomes: list[tuple[_Request, Said, tuple[int, int]]] = []
        self._drafts: deque[tuple[str, Sequence[float]]] = deque(maxlen=tuning.recent)
        """What was not looked at yet."""

    def learn(self, outcomes: Outcomes, said: Confidences = None) -> None:
        """Takes in what became of drafts with these confidences."""
        known = said or {}
        self._outcomes += [(self._of(n), known.get(n), found) for n, found in outcomes.items()]

    def drafted(self, requests: Sequence[str], said: Confidences = None) -> np.ndarray:
        """``survival`` of drafts that were made; ``expected`` goes by the last ones."""
        self._drafts.extend((said or {}).items())
        return self.survival(requests, said)

    def survival(self, requests: Sequence[str], said: Confidences = None) -> np.ndarray:
        """float64 [n, K]: probability that these requests' drafts, with these confidences, are
        accepted up to and with each position; NaN where there is none. By what was learned until
        ``expected`` was last asked."""
        rows = self._rows(map((said or {}).get, requests))
        return self._survival([*map(self._of, requests)], rows)

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, m, K]: the same of drafts as they are to be expected of each request, 0 where
        there is none: of its group's last ones, where confidences are known. How far drafts differ
        decides what it brings to verify only part of some."""
        self._look()
        of, count = [*map(self._of, requests)], len(requests)
        sizes = np.array([*map(len, self.recent)])
        starts, groups = np.cumsum(sizes) - sizes, [request.group for request in of]
        sizes, starts = sizes[groups, None], starts[groups, None]
        each = np.arange(-(-int(sizes.max()) // count))
        chosen = starts + (np.arange(count)[:, None] + count * each) % sizes
        found = self._survival(of, self._rows(chain(*self.recent))[chosen])
        return np.nan_to_num(found, copy=False)

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._requests.pop(request, None)

    def _survival(self, of: Sequence[_Request], rows: np.ndarray) -> np.ndarray:
        """Of confidences [n, ..., K], of these requests."""
        rates = self._rates[[request.group for request in of]]
        rates *= np.array([[request.factor] for request in of])
        once = rows * (rates[:, None] if rows.ndim > rates.ndim else rates)
        return np.minimum(once, 1.0, out=once).cumprod(-1)

    def _rows(self, said: Iterable[Said]) -> np.ndarray:
        """float64 [n, K]: confidences, the usual ones where there are none."""
        count, usual = len(self._usual), self._usual
        rows = [row or usual for row in said]
        return np.array([r if len(r) == count else [*r, *self._none][:count] for r in rows])

    def _look(self) -> None:
        """Learns from what was taken in."""
        for name, row in self._drafts:
            if row and name in self._requests:
                self.recent[self._requests[name].group].append(row)
        self._drafts.clear()
        if not self._outcomes:
            return
        of, said, outcomes = zip(*self._outcomes, strict=True)
        self._outcomes.clear()
        verified, accepted = np.array(outcomes)[:, :, None].swapaxes(0, 1)
        at, groups = np.arange(len(self._usual)), [request.group for request in of]
        seen = at < np.minimum(accepted + 1, verified)
        hits, confidences = (seen & (at < accepted)) * 1.0, np.where(seen, self._rows(said), 0.0)

        def by_group(rows: np.ndarray) -> np.ndarray:
            found = np.zeros((len(self._groups), rows.shape[1]))
            np.add.at(found, groups, rows)
            return found

        # What is expected is told after the group has learned of it: what a request alone tells
        # would count twice. What is a request's own is learned slowly at any time.
        both = [by_group(rows.sum(1, keepdims=True)) for rows in (hits, confidences)]
        self._worth, self._weight = self._mixed(self._worth, self._weight, *both)
        expected = confidences * self._worth[groups]
        both = [by_group(rows) for rows in (hits, expected)]
        self._positions, self._weights = self._mixed(self._positions, self._weights, *both)
        self._rates = self._positions * self._worth
        totals = np.nansum(expected * self._positions[groups], 1).tolist()
        memory = self._tuning.memory
        for request, total, hit in zip(of, totals, hits.sum(1).tolist(), strict=True):
            request.factor += (hit - total * request.factor) / memory

    def _mixed(
        self, known: np.ndarray, weights: np.ndarray, hits: np.ndarray, expected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accepted tokens over expected ones, and the expected ones, older ones fading."""
        kept = np.minimum(weights, np.maximum(self._tuning.memory - expected, 0.0))
        now = kept + expected
        return (known * kept + hits) / now, np.minimum(now, self._tuning.memory)

    def _of(self, name: str) -> _Request:
        if (found := self._requests.get(name)) is None:
            key, limit = self._group(name), self._limit(name)
            if key not in self._groups:
                self._groups[key] = len(self._groups)
                may = np.where(np.arange(len(self._usual)) < limit, 1.0, np.nan)
                prior = np.full(len(may), self._tuning.prior)
                self._worth = np.vstack([self._worth, [1.0]])
                self._weight = np.vstack([self._weight, prior[:1]])
                self._positions = np.vstack([self._positions, may])
                self._weights = np.vstack([self._weights, prior])
                self._rates = np.vstack([self._rates, may])
                self.recent.append(deque([self._usual], self._tuning.recent))
            found = self._requests[name] = _Request(self._groups[key])
        return found

"""How likely a draft token is accepted, given that all before it were. Pure.

A logistic curve: of the log-odds of the drafter's confidence in the token, with a bias for its
position and one for its request; without confidences the biases alone. It is learned as decoding
goes on by Newton steps, older information fading, and apart for groups of requests: of a sampled
one drafts are accepted less than of a greedy one.

    pytest tests/unit/test_adaptive.py
"""

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import round_rows

Confidences = Mapping[str, Sequence[float]]
"""By request, the probability that the drafter gives each token of its draft."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""
_USUAL = 0.6
"""Probability of a token of which nothing is known."""


class _Group:
    """What was learned of one group of requests."""

    def __init__(self, index: int, num_weights: int, tuning: Tuning) -> None:
        self.index, self.num_drafts = index, 0
        # What is a position's own is believed half as fast as what all have in common.
        self.prior = np.diag(tuning.prior * np.array([1, 1, *[2] * (num_weights - 2)]))
        self.information = self.prior
        self.recent: deque[np.ndarray] = deque(maxlen=tuning.recent)
        """Log-odds of the last drafts' confidences, [K] each."""


class Acceptance:
    """Conditional acceptance of draft tokens at up to ``max_draft`` positions."""

    def __init__(
        self,
        max_draft: int,
        tuning: Tuning,
        group: Callable[[str], Hashable] = lambda _: None,
        limit: Callable[[str], int] | None = None,
    ) -> None:
        """``group``: which of a request's kind are accepted alike, and have the same limit;
        ``limit``: the draft tokens that a request may have, ``max_draft`` where left out."""
        self._max_draft, self._tuning = max_draft, tuning
        self._group, self._limit = group, limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._by_index: list[_Group] = []
        self._weights = np.zeros((0, 2 + max_draft))
        """By group: slope, bias, and the positions' biases; -inf past the limit."""
        self._requests: dict[str, tuple[int, float, float]] = {}
        """Of each its group, its bias and the information that this is based on."""
        self._positions = np.arange(max_draft)
        self.young: set[str] = set()
        """Requests of groups of which next to nothing is known."""

    def learn(self, steps: Iterable[tuple[Outcomes, Confidences | None]]) -> bool:
        """Takes in what became of drafts; returns whether as many of a group were seen as were
        known of it before."""
        seen = [
            (name, *counts, said.get(name) if said else None)
            for outcomes, said in steps
            for name, counts in outcomes.items()
            if counts[0]
        ]
        if not seen:
            return False
        names, verified, accepted, said = zip(*seen, strict=True)
        own, (x, is_said), memory = self._own(names), self._log_odds(said), self._tuning.memory
        right = self._positions < np.array(accepted)[:, None]
        reached = self._positions < np.minimum(np.array(accepted) + 1, verified)[:, None]
        error = right - _odds(self._scores(x, is_said, own))
        has_news = False
        for index in np.unique(own[:, 0]).astype(int).tolist():
            group = self._by_index[index]
            rows, at = (reached & (own[:, :1] == index)).nonzero()
            features = np.zeros((len(rows), len(group.prior)))
            if is_said:
                features[:, 0], features[:, 1] = x[rows, at], 1.0
            features[np.arange(len(rows)), 2 + at] = 1.0
            over, kept = error[rows, at], max(1 - len(rows) / memory, 0.0)
            group.information = (
                group.prior
                + kept * (group.information - group.prior)
                + features.T @ (features * (np.abs(over) * (1 - np.abs(over)))[:, None])
            )
            step = np.linalg.solve(group.information, features.T @ over)
            # No further than the curve may be taken for a line.
            self._weights[index] += np.clip(step, -1.0, 1.0)
            count = int((own[:, 0] == index).sum())
            has_news |= group.num_drafts.bit_length() < (group.num_drafts + count).bit_length()
            group.num_drafts += count
        self.young = {
            name
            for name in self.young
            if self._by_index[self._requests[name][0]].num_drafts < self._tuning.every
        }
        # What the group has learned is no request's own.
        likely = _odds(self._scores(x, is_said, own))
        rows = np.stack([right - likely, likely * (1 - likely), np.ones_like(likely)], 2)
        sums: dict[str, np.ndarray] = {}
        for name, row in zip(names, (rows * reached[:, :, None]).sum(1), strict=True):
            sums[name] = row + sums.get(name, 0.0)
        for name, (over, information, count) in sums.items():
            index, bias, known = self._requests[name]
            known = known * max(1 - count / memory, 0.0) + information
            step = min(max(over / (2 * self._tuning.prior + known), -1.0), 1.0)
            self._requests[name] = index, bias + float(step), float(known)
        return has_news

    def survival(
        self, requests: Sequence[str], confidences: Confidences | None = None
    ) -> np.ndarray:
        """float64 [n, K]: probability that each request's draft is accepted up to and with each
        position; past its limit 0. Remembers the drafts for ``expected``."""
        own = self._own(requests)
        said = [None if confidences is None else confidences.get(name) for name in requests]
        x, is_said = self._log_odds(said)
        if is_said:
            for row, index, own_said in zip(x, own[:, 0].astype(int).tolist(), said, strict=True):
                if own_said:
                    self._by_index[index].recent.append(row)
        return np.cumprod(_odds(self._scores(x, is_said, own)), axis=1)

    def lengths(self, survival: np.ndarray, prices: "np.ndarray | float") -> list[int]:
        """Of each request's draft tokens, how many are accepted with a probability above the
        request's price, [n, 1] or one for all.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are
        made anew for each number of rows.
        """
        count, k = survival.shape
        worth = np.where(survival > 0, survival - prices, -np.inf).ravel()
        kept = max(round_rows(count + int((worth > 0).sum())) - count, 0)
        best = np.argsort(-worth, kind="stable")[: min(kept, int((survival > 0).sum()))]
        found: list[int] = np.bincount(best // k, minlength=count).tolist()
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, K]: survival of whole drafts as they are to be expected of these requests,
        which are of one group.

        The group's last drafts, where confidences are known: how far drafts differ decides what it
        brings to verify only part of some.
        """
        own = self._own(requests)
        x = np.array(self._by_index[int(own[0, 0])].recent)
        if not len(x):
            x = np.zeros((len(own), self._max_draft))
            return np.cumprod(_odds(self._scores(x, False, own)), axis=1)
        return np.cumprod(_odds(self._scores(x, True, own[np.arange(len(x)) % len(own)])), axis=1)

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]
            self.young.discard(request)

    def group_of(self, request: str) -> int:
        """Its group's index."""
        known = self._requests.get(request)
        return known[0] if known else int(self._own([request])[0, 0])

    def _own(self, requests: Sequence[str]) -> np.ndarray:
        """[n, 3] of ``_requests``; new ones are taken in."""
        for name in () if self._requests.keys() >= set(requests) else requests:
            if name not in self._requests:
                group = self._groups.get(self._group(name)) or self._new_group(name)
                self._requests[name] = group.index, 0.0, 0.0
                if group.num_drafts < self._tuning.every:
                    self.young.add(name)
        return np.array([self._requests[name] for name in requests])

    def _new_group(self, request: str) -> _Group:
        group = _Group(len(self._by_index), 2 + self._max_draft, self._tuning)
        self._groups[self._group(request)] = group
        self._by_index.append(group)
        weights = np.array([1.0, 0.0, *[0.0] * self._max_draft])
        weights[2 + self._limit(request) :] = -np.inf
        self._weights = np.vstack([self._weights, weights])
        return group

    def _log_odds(self, said: Sequence[Sequence[float] | None]) -> tuple[np.ndarray, bool]:
        """[n, K] of the confidences, and whether there are any."""
        k = self._max_draft
        if not any(said):
            return np.zeros((len(said), k)), False
        p = np.array([[*(row or ()), *[_USUAL] * (k - len(row or ()))] for row in said])
        return np.log(np.clip(p, 0.0025, 0.9975) / (1 - np.clip(p, 0.0025, 0.9975))), True

    def _scores(self, x: np.ndarray, is_said: bool, own: np.ndarray) -> np.ndarray:
        """[n, K] log-odds of acceptance."""
        weights = self._weights[own[:, 0].astype(int)]
        usual = np.log(_USUAL / (1 - _USUAL))
        shared = weights[:, :1] * x + weights[:, 1:2] if is_said else usual
        found: np.ndarray = shared + weights[:, 2:] + own[:, 1:2]
        return found


def _odds(x: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds."""
    found: np.ndarray = 1 / (1 + np.exp(-x))
    return found

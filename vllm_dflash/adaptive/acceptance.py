"""How likely a draft token is accepted, given that all before it were. Pure.

A logistic curve: of the log-odds of the drafter's confidence in the token, with a bias for its
position and one for its request; without confidences the biases alone. It is learned as decoding
goes on by Newton steps, older information fading, and apart for groups of requests: of a sampled
one drafts are accepted less than of a greedy one.

    pytest tests/unit/test_adaptive.py
"""

import math
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from heapq import nlargest

import numpy as np

from vllm_dflash.adaptive.tuning import Tuning
from vllm_dflash.cost_profile import round_rows

Confidences = Mapping[str, Sequence[float]]
"""By request, the probability that the drafter gives each token of its draft."""
Outcomes = Mapping[str, tuple[int, int]]
"""By request, draft tokens that were verified and how many of them were accepted."""
_USUAL = 0.6
"""Probability of a token of which nothing is known."""
_BINS = 64
"""Confidences that are told apart where drafts are cut."""
_APART = 4
"""How much slower what is a position's or a request's own is learned than what all share."""


class _Group:
    """What was learned of one group of requests."""

    def __init__(self, max_draft: int, limit: int, tuning: Tuning) -> None:
        self.num_drafts = 0
        self.weights = np.array([1.0, 0.0, *[0.0] * limit, *[-math.inf] * (max_draft - limit)])
        """Slope, bias, and the positions' biases; past the limit nothing is accepted."""
        self.information = np.zeros((2 + max_draft, 2 + max_draft))
        self.recent: deque[Sequence[float]] = deque(maxlen=tuning.recent)
        """Confidences of the last drafts, [K] each."""
        self.odds: list[list[float]] = []
        """[K][bins] of acceptance by confidence; empty where they have to be reckoned anew."""


class _Request:
    """What was learned of one request: its bias, and the information that this is based on."""

    __slots__ = ("bias", "group", "information")

    def __init__(self, group: _Group) -> None:
        self.group, self.bias, self.information = group, 0.0, 0.0


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
        self._max_draft, self._tuning, self._group = max_draft, tuning, group
        self._limit = limit or (lambda _: max_draft)
        self._groups: dict[Hashable, _Group] = {}
        self._requests: dict[str, _Request] = {}
        self._usual = [_USUAL] * max_draft
        self._positions = np.arange(max_draft)
        self.young: set[str] = set()
        """Requests of groups of which next to nothing is known."""

    def learn(self, steps: Iterable[tuple[Outcomes, Confidences | None]]) -> bool:
        """Takes in what became of drafts; returns whether as many of a group were seen as were
        known of it before."""
        seen: dict[_Group, list[tuple[_Request, int, int, Sequence[float] | None]]] = {}
        for outcomes, said in steps:
            for name, (verified, accepted) in outcomes.items():
                if verified:
                    request = self._of(name)
                    row = said.get(name) if said else None
                    seen.setdefault(request.group, []).append((request, verified, accepted, row))
        has_news = False
        for group, rows in seen.items():
            self._learn(group, *zip(*rows, strict=True))
            before, group.num_drafts = group.num_drafts, group.num_drafts + len(rows)
            has_news |= before.bit_length() < group.num_drafts.bit_length()
        if self.young:
            every = self._tuning.every
            self.young = {name for name in self.young if self._of(name).group.num_drafts < every}
        return has_news

    def _learn(
        self,
        group: _Group,
        requests: Sequence[_Request],
        verified: Sequence[int],
        accepted: Sequence[int],
        said: Sequence[Sequence[float] | None],
    ) -> None:
        """One Newton step of a group's curve, and then of its requests' biases."""
        tuning = self._tuning
        x = _log_odds([self._whole(row) for row in said])
        bias = np.array([[request.bias] for request in requests])
        right = self._positions < np.array(accepted)[:, None]
        reached = self._positions < np.minimum(np.array(accepted) + 1, verified)[:, None]
        rows, at = reached.nonzero()
        over = (right - _odds(_scores(group, x, bias)))[rows, at]
        features = np.zeros((len(rows), len(group.weights)))
        features[:, 0], features[:, 1] = x[rows, at] if any(said) else 0.0, 1.0
        features[np.arange(len(rows)), 2 + at] = 1.0
        prior = tuning.prior * np.diag([1.0, 1.0, *[_APART] * self._max_draft])
        group.information = max(1 - len(rows) / tuning.memory, 0.0) * group.information
        group.information += features.T @ (features * (np.abs(over) * (1 - np.abs(over)))[:, None])
        # No further than the curve may be taken for a line.
        step = np.linalg.solve(prior + group.information, features.T @ over)
        group.weights += np.clip(step, -1.0, 1.0)
        group.odds = []
        # What the group has learned is no request's own.
        likely = _odds(_scores(group, x, bias))
        told = np.stack([right - likely, likely * (1 - likely), np.ones_like(x)], 2)
        sums: dict[_Request, np.ndarray] = {}
        for request, row in zip(requests, (told * reached[:, :, None]).sum(1), strict=True):
            sums[request] = row + sums.get(request, 0.0)
        for request, row in sums.items():
            error, information, count = row.tolist()
            request.information *= max(1 - count / tuning.memory, 0.0)
            request.information += information
            step = error / (_APART * tuning.prior + request.information)
            request.bias += min(max(step, -1.0), 1.0)

    def lengths(
        self, requests: Sequence[str], prices: Sequence[float], confidences: Confidences | None
    ) -> list[int]:
        """Of each request's draft tokens, how many are accepted with a probability above its price.
        Remembers the drafts for ``expected``.

        A few more or fewer, so that the target's rows come in round numbers: a CPU's kernels are
        made anew for each number of rows.
        """
        found, inside, outside = [], [], []
        for i, (name, price) in enumerate(zip(requests, prices, strict=True)):
            request = self._of(name)
            group, row = request.group, self._usual
            if confidences and (own := confidences.get(name)):
                row = own
                group.recent.append(row)
            if not group.odds:
                self._tabulate(group)
            probability, count, factor = 1.0, 0, math.exp(request.bias)
            kept = 0.0
            for odds, confidence in zip(group.odds, row, strict=False):
                once = odds[int(confidence * _BINS)] * factor
                probability *= once / (1 + once)
                if probability <= price or probability <= 0.0:
                    if probability > 0.0 and price < 1.0:
                        outside.append((probability - price, i))
                    break
                kept, count = probability, count + 1
            if count:
                inside.append((price - kept, i))
            found.append(count)
        rows = len(found) + sum(found)
        missing = round_rows(rows) - rows
        for _, i in nlargest(abs(missing), outside if missing > 0 else inside) if missing else ():
            found[i] += 1 if missing > 0 else -1
        return found

    def expected(self, requests: Sequence[str]) -> np.ndarray:
        """float64 [n, K]: survival of whole drafts as they are to be expected of these requests,
        which are of one group.

        The group's last drafts, where confidences are known: how far drafts differ decides what it
        brings to verify only part of some.
        """
        recent = self._of(requests[0]).group.recent or [None] * len(requests)
        return self.survival([requests[i % len(requests)] for i in range(len(recent))], recent)

    def survival(
        self, requests: Sequence[str], said: Iterable[Sequence[float] | None]
    ) -> np.ndarray:
        """float64 [n, K]: probability that drafts of these requests, which are of one group, are
        accepted up to and with each position; past the limit 0."""
        known, x = [self._of(name) for name in requests], _log_odds([*map(self._whole, said)])
        bias = np.array([[request.bias] for request in known])
        found: np.ndarray = np.cumprod(_odds(_scores(known[0].group, x, bias)), axis=1)
        return found

    def forget(self, requests: Container[str]) -> None:
        """These requests have ended."""
        for request in [name for name in self._requests if name in requests]:
            del self._requests[request]
            self.young.discard(request)

    def group_of(self, request: str) -> Hashable:
        """Requests of one group are accepted alike."""
        return self._of(request).group

    def _of(self, name: str) -> _Request:
        request = self._requests.get(name)
        if request is None:
            key, tuning = self._group(name), self._tuning
            if key not in self._groups:
                self._groups[key] = _Group(self._max_draft, self._limit(name), tuning)
            request = self._requests[name] = _Request(self._groups[key])
            if request.group.num_drafts < tuning.every:
                self.young.add(name)
        return request

    def _whole(self, row: Sequence[float] | None) -> Sequence[float]:
        """Confidences of a whole draft: of a shorter one, and of none, the usual ones."""
        if row is None or len(row) < self._max_draft:
            return [*(row or ()), *self._usual[len(row or ()) :]]
        return row

    def _tabulate(self, group: _Group) -> None:
        middles = _log_odds([[(i + 0.5) / _BINS for i in range(_BINS)]] * self._max_draft)
        scores = group.weights[0] * middles + group.weights[1] + group.weights[2:, None]
        odds = np.exp(scores)
        # A draft token of which all is sure has the last bin.
        group.odds = np.hstack([odds, odds[:, -1:]]).tolist()


def _scores(group: _Group, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[n, K] log-odds of acceptance, by those of the confidences and the requests' biases."""
    weights = group.weights
    scores: np.ndarray = weights[0] * x + weights[1] + weights[2:] + bias
    return scores


def _log_odds(p: Sequence[Sequence[float]]) -> np.ndarray:
    kept = np.clip(np.array(p), 0.0025, 0.9975)
    found: np.ndarray = np.log(kept / (1 - kept))
    return found


def _odds(x: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds."""
    found: np.ndarray = 1 / (1 + np.exp(-x))
    return found

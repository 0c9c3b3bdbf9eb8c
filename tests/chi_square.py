"""Pearson's chi-square: are two samples, or a sample and a distribution, of one kind? Pure;
p-values by the incomplete gamma function."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import torch

FEWEST = 10
"""Expected count below which a cell is pooled with the other rare ones: the statistic is chi-square
distributed only for full cells."""


def p_of_fit(sample: Iterable[Hashable], distribution: Mapping[Hashable, float]) -> float:
    """How likely a sample at least this far from the distribution is, if drawn from it."""
    seen = Counter(sample)
    size = seen.total()
    assert seen.keys() <= distribution.keys(), "the sample has what the distribution lacks"
    cells, rest = [], [0.0, 0.0]
    for outcome, probability in distribution.items():
        expected = size * probability
        if expected >= FEWEST:
            cells.append((seen[outcome], expected))
        else:
            rest[0], rest[1] = rest[0] + seen[outcome], rest[1] + expected
    cells += [(rest[0], rest[1])] if rest[1] >= FEWEST else []
    assert len(cells) > 2, "too few cells: draw more, or from a more even distribution"
    return survival(sum((a - b) ** 2 / b for a, b in cells), len(cells) - 1)


def p_of_same(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """How likely two samples at least this far apart are, if drawn from one distribution."""
    a, b = Counter(first), Counter(second)
    n, m = a.total(), b.total()
    fewest = FEWEST * (n + m) / min(n, m)
    cells, rest = [], [0, 0]
    for outcome in a | b:
        if a[outcome] + b[outcome] >= fewest:
            cells.append((a[outcome], b[outcome]))
        else:
            rest[0], rest[1] = rest[0] + a[outcome], rest[1] + b[outcome]
    cells += [(rest[0], rest[1])] if sum(rest) >= fewest else []
    assert len(cells) > 2, "too few cells: draw more, or from a more even distribution"
    return survival(
        sum((x * (m / n) ** 0.5 - y * (n / m) ** 0.5) ** 2 / (x + y) for x, y in cells),
        len(cells) - 1,
    )


def survival(statistic: float, degrees: float) -> float:
    """The chi-square distribution's upper tail."""
    return torch.special.gammaincc(
        torch.tensor(degrees / 2, dtype=torch.float64),
        torch.tensor(statistic / 2, dtype=torch.float64),
    ).item()

"""The interval of a gain, against simulations and worked examples."""

import math
import random
import statistics

import pytest

from vllm_dflash.follow.interval import compare, students_t


def test_worked_by_hand() -> None:
    """Two prompts: the old drafter's tau is 1 + 6 / 4, the new one's 1 + 8 / 4; of the new one's
    parts, (accepted - 2 x drafts) / 2, the difference of the old one's, (accepted - 1.5 x drafts) /
    2."""
    found = compare([[2, 2], [2, 4]], [[2, 3], [2, 5]])
    assert (found.old, found.new, found.prompts) == (2.5, 3.0, 2)
    assert found.gain == 0.5
    assert found.half == 0.0, "each prompt gains the same"
    assert found.is_better
    assert str(found) == (
        "tau 2.50 -> 3.00 on 2 held-out prompts (+0.50, 95 % interval +0.50 to +0.50)"
    )


def test_parts_that_differ() -> None:
    """z of the two prompts are -0.5 and 0.5: variance 0.5, of their mean 0.25."""
    found = compare([[2, 2], [2, 2]], [[2, 2], [2, 4]])
    assert found.gain == pytest.approx(0.5)
    assert found.half == pytest.approx(12.706 * math.sqrt(0.5 / 2))
    assert not found.is_better


def test_one_prompt_says_nothing() -> None:
    assert not compare([[5, 5]], [[5, 20]]).is_better


def test_no_worse_than_by_chance() -> None:
    """Two drafters that are the same one: in at most some 2.5 % of trials one looks better."""
    dice, better = random.Random(1), 0
    for _ in range(1000):
        both = []
        for _ in range(2):
            counts = []
            for _ in range(24):
                drafts = dice.randint(20, 40)
                counts.append([drafts, sum(dice.randint(0, 7) for _ in range(drafts))])
            both.append(counts)
        better += compare(*both).is_better
    assert better < 45


def test_the_interval_holds_the_truth() -> None:
    """The truth of a gain is in it in 95 % of trials or so."""
    dice, held = random.Random(2), 0
    for _ in range(600):
        old, new = [], []
        for _ in range(20):
            ease = dice.random()  # of the prompt, for both
            for counts, gain in ((old, 0.0), (new, 0.1)):
                drafts = dice.randint(20, 40)
                hits = sum(
                    sum(dice.random() < 0.4 + 0.3 * ease + gain for _ in range(7))
                    for _ in range(drafts)
                )
                counts.append([drafts, hits])
        found = compare(old, new)
        held += abs(found.gain - 0.7) <= found.half
    assert 0.92 < held / 600 < 0.98


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (4, 2.776), (10, 2.228), (63, 1.998), (1000, 1.962)]
)
def test_students_t(freedom: int, quantile: float) -> None:
    """A table's."""
    assert students_t(freedom) == pytest.approx(quantile, rel=0.01)


def test_students_t_against_samples() -> None:
    """Of five values of a normal distribution, the mean over its standard error."""
    dice, beyond = random.Random(3), 0
    for _ in range(4000):
        values = [dice.gauss(0, 1) for _ in range(5)]
        error = statistics.stdev(values) / math.sqrt(5)
        beyond += abs(statistics.mean(values)) > students_t(4) * error
    assert 0.04 < beyond / 4000 < 0.06


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="2 prompts against 1"):
        compare([[1, 1], [1, 1]], [[1, 1]])
    with pytest.raises(ValueError, match="nothing was drafted"):
        compare([[0, 0]], [[0, 0]])

"""The controller under asynchronous scheduling on a large GPU, in numbers
(``tests/simulation_async.py``)."""

import pytest

from simulation_async import AsyncServer

LENGTHS = (3, 7, 15)


@pytest.mark.slow
@pytest.mark.parametrize("context", [1 << 10, 1 << 15, 1 << 17])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("num_reqs", [1, 8, 32, 128, 256])
def test_never_slower_than_plain_and_close_to_the_best_fixed_k(
    num_reqs: int, rate: float, context: int
) -> None:
    """From the first step on; the whole grid is ``tests/prove_async.py``'s. vLLM's adaptive
    verification drafts in every step, with confidences that are right here."""
    server = AsyncServer(num_reqs, rate, context)
    reached = server.adaptive(500)
    assert reached >= 0.98 * server.fixed(0)
    assert reached >= 0.95 * max(map(server.fixed, LENGTHS))
    assert reached >= 0.95 * server.adaptive_verification()


@pytest.mark.parametrize(("num_reqs", "rate"), [(128, 0.05), (128, 0.1), (256, 0.3)])
def test_first_drafts_end_as_soon_as_it_is_known_that_they_do_not_pay(
    num_reqs: int, rate: float
) -> None:
    """Each of them takes as long as two and a half plain steps. Steps of the trial before them
    counted to the first choice, and five were made in place of three: 0.975."""
    server = AsyncServer(num_reqs, rate, 1 << 11)
    assert server.adaptive(500) >= 0.98 * server.fixed(0)

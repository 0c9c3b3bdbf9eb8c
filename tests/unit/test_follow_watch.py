"""The look at a server's acceptance: over the time since the last look, with its interval."""

import math
from typing import Any

import pytest

from vllm_dflash.follow.watch import SHAPE, look, record_of, threshold
from vllm_dflash.metrics.figures import Scrape
from vllm_dflash.records import misfit


def page(
    lengths: dict[int, int],
    *,
    engine: str = "0",
    drafter_id: str = "aaaa",
    proved: float | None = 4.0,
    swaps: int = 0,
) -> str:
    """A page of /metrics: how many verifications committed so many tokens."""
    own = f'model_name="m",engine="{engine}"'
    count, total = sum(lengths.values()), sum(k * n for k, n in lengths.items())
    context = f'{own},context_length="0-255",prefix_cached="false"'
    return "\n".join(
        [
            f'vllm_dflash_drafter_info{{{own},block_size="8"}} 1',
            f"vllm_dflash_accepted_length_count{{{own}}} {count}",
            f"vllm_dflash_accepted_length_sum{{{own}}} {total}",
            f"vllm_dflash_context_verifications_total{{{context}}} {count}",
            f"vllm_dflash_context_committed_tokens_total{{{context}}} {total}",
            f'vllm_dflash_drafter_swaps_total{{{own},result="swapped"}} {swaps}',
            f'vllm_dflash_drafter_swaps_total{{{own},result="refused"}} 3',
            "vllm_dflash_drafter_serving_since_seconds"
            f'{{{own},drafter="/d",drafter_id="{drafter_id}"}} 1e9',
            *(
                []
                if proved is None
                else [f"vllm_dflash_drafter_proved_accepted_length{{{own}}} {proved}"]
            ),
        ]
    )


def scraped(*pages: str) -> Scrape:
    return Scrape.parse("\n".join(pages) + "\n", 0.0)


def record(now: Scrape) -> dict[str, Any]:
    found = record_of(now, 1000.0)
    assert misfit(found, SHAPE) is None
    return found


HALF = 1.96 * math.sqrt(6 / 400)


def test_since_the_server_began() -> None:
    """400 verifications of 2 tokens in blocks of 8: their variance is 1 x 6 at most."""
    found = look(scraped(page({1: 200, 3: 200})), None)
    assert found is not None
    assert found.tau == 2.0
    assert found.verifications == 400
    assert found.half == pytest.approx(HALF)
    assert found.since is None
    assert found.by_context == {"0-255": 2.0}
    assert str(found) == (
        "tau 2.00 +- 0.24 over 400 verifications since the server began (by context length 0-255:"
        " 2.00), proved at 4.00: 50% of it"
    )


def test_by_the_classes_that_requests_name() -> None:
    own = 'model_name="m",engine="0"'
    classes = [
        f'vllm_dflash_prompt_class_{what}_total{{{own},prompt_class="{name}"}} {count}'
        for name, n, total in (("code", 100, 160), ("chat", 50, 150))
        for what, count in (("verifications", n), ("committed_tokens", total))
    ]
    first = scraped(page({2: 500}), *classes)
    found = look(first, None)
    assert found is not None
    assert found.by_class == {"chat": 3.0, "code": 1.6}
    assert "0-255: 2.00; by class chat: 3.00, code: 1.60)" in str(found)
    again = look(scraped(page({2: 1000}), *classes), record(first))
    assert again is not None
    assert again.by_class == {}


def test_since_the_last_look() -> None:
    """What was before it does not count: tau was 4, and has been 2 since."""
    before = scraped(page({4: 1000}))
    found = look(scraped(page({4: 1000, 1: 200, 3: 200})), record(before))
    assert found is not None
    assert (found.tau, found.verifications, found.since) == (2.0, 400, 1000.0)
    assert found.half == pytest.approx(HALF)
    assert found.by_context == {"0-255": 2.0}


def test_engines_of_a_server_are_summed_up() -> None:
    found = look(scraped(page({1: 100}), page({3: 100}, engine="1", proved=3.0)), None)
    assert found is not None
    assert (found.tau, found.verifications, found.proved) == (2.0, 200, 3.0)


def test_nothing_since() -> None:
    now = scraped(page({4: 1000}))
    found = look(now, record(now))
    assert found is not None
    assert found.tau is None
    assert not found.is_below(10)
    assert "no draft was verified since" in str(found)


def test_a_server_that_began_anew() -> None:
    """Its counts are smaller: since its start, then."""
    found = look(scraped(page({2: 500})), record(scraped(page({4: 1000}))))
    assert found is not None
    assert (found.tau, found.since) == (2.0, None)


def test_another_drafter_since_the_last_look() -> None:
    """Counts from before and after the swap are one sum: nothing can be said, until the next."""
    before = record(scraped(page({4: 1000})))
    assert look(scraped(page({4: 1000, 1: 400}, drafter_id="bbbb", swaps=1)), before) is None
    # Without a swap the server was started anew with it.
    assert look(scraped(page({4: 1000, 1: 400}, drafter_id="bbbb")), before) is not None


def test_below_by_more_than_the_interval() -> None:
    found = look(scraped(page({1: 200, 3: 200})), None)
    assert found is not None
    assert not found.is_below(2.2)
    assert found.is_below(2.3)
    few = look(scraped(page({1: 40, 3: 40})), None)
    assert few is not None
    assert not few.is_below(16), "80 verifications say little"


@pytest.mark.parametrize(
    ("when_below", "proved", "limit"), [(0.8, 4.0, 3.2), (1.0, 4.0, 4.0), (2.5, None, 2.5)]
)
def test_threshold(when_below: float, proved: float | None, limit: float) -> None:
    assert threshold(when_below, proved) == pytest.approx(limit)


def test_a_share_of_nothing() -> None:
    assert threshold(0.8, None) is None
    found = look(scraped(page({1: 200}, proved=None)), None)
    assert found is not None
    assert found.proved is None
    assert "proved" not in str(found)
    assert not math.isnan(found.half)

"""The prefix cache with a drafter: as many hits as without one, in shared prompts and in continued
conversations, and tau as with a cold cache.

pytest -s tests/engine/test_prefix_cache.py
"""

from pathlib import Path

import pytest

from engine.harness import DRAFTER, TARGET, Batch, Job, held_out_prompts, run_engines
from variants import VARIANTS

pytestmark = pytest.mark.engine
TURNS, TOKENS = 6, 48
"""So many that the second turn's answers fill a page of 128 that their prompts have begun."""
NAMES = ("embedded pair", "sliding layers")
"""A trained drafter of full attention, and a random one whose layers see a window only."""


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    """Conversations of two turns over one long beginning: every prompt is the one before it, its
    answer, and a new question."""
    text = [token for prompt in held_out_prompts(60) for token in prompt]
    return [text[:200] + text[200 + 90 * i : 290 + 90 * i] for i in range(TURNS)]


@pytest.fixture(scope="module")
def batches(
    asked: list[list[int]], random_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[Batch]]:
    """By pair and ``plain`` or ``drafted``: the prompts one by one in an engine with an empty
    cache, and once more in the same engine."""
    pairs = {
        "embedded pair": (TARGET, DRAFTER, asked),
        "sliding layers": (
            random_target,
            VARIANTS["dflash mixed"].make(tmp_path_factory.mktemp("sliding") / "drafter"),
            [[t % 512 for t in p] for p in asked],
        ),
    }
    firsts = run_engines(
        [Job(target, None, prompts, max_tokens=TOKENS) for target, _, prompts in pairs.values()]
    )
    jobs = {}
    for (name, (target, drafter, prompts)), first in zip(pairs.items(), firsts, strict=True):
        turns = [
            turn
            for p, answer in zip(prompts, first[0].tokens, strict=True)
            for turn in (p, p + answer + p[-9:])
        ]
        for kind, model in (("plain", None), ("drafted", drafter)):
            jobs[name, kind] = Job(target, model, turns, max_tokens=TOKENS, batch_sizes=(1, 1))
    return dict(zip(jobs, run_engines(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_as_many_hits_as_without_a_drafter(
    batches: dict[tuple[str, str], list[Batch]], name: str
) -> None:
    for which, plain, drafted in zip(
        ("cold", "warm"), batches[name, "plain"], batches[name, "drafted"], strict=True
    ):
        found = {
            kind: batch.report["counters"]
            for kind, batch in (("plain", plain), ("drafted", drafted))
        }
        rates = {
            kind: counters["prefix_cache_hits"] / counters["prefix_cache_queries"]
            for kind, counters in found.items()
        }
        print(
            f"\n{name}, {which}: hit rate {rates['drafted']:.3f} with a drafter,"
            f" {rates['plain']:.3f} without"
        )
        assert found["drafted"]["prefix_cache_queries"] == found["plain"]["prefix_cache_queries"]
        assert rates["drafted"] >= rates["plain"] > 0.3
        assert drafted.tokens == plain.tokens


def test_tau_with_a_warm_cache(batches: dict[tuple[str, str], list[Batch]]) -> None:
    cold, warm = batches["embedded pair", "drafted"]
    print(f"\ntau {cold.tau:.3f} cold, {warm.tau:.3f} warm")
    assert (
        warm.report["counters"]["prefix_cache_hits"] > cold.report["counters"]["prefix_cache_hits"]
    )
    assert abs(warm.tau / cold.tau - 1) < 0.02

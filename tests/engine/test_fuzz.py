"""A part of the differential fuzzer with a seed that does not change: random requests, plain
decoding against drafts, no difference.

pytest -s tests/engine/test_fuzz.py
python tests/fuzz_differential.py --minutes 30       (much longer, and anything it may draw)
"""

import random
from typing import Any

import pytest

from fuzzing.draw import ORDINARY, draw_round
from fuzzing.fuzzer import Fuzzer
from fuzzing.pairs import PAIRS
from fuzzing.tally import Tally

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ROUNDS = 7


def settings(**changes: Any) -> dict[str, Any]:
    """An engine's, as the fuzzer draws them: here nothing but the requests is left to the dice."""
    args = {"max_num_seqs": 16, "max_num_batched_tokens": 128} | changes.pop("args", {})
    found = {
        "args": args,
        "num_speculative_tokens": 7,
        "draft_sample_method": "greedy",
        "plan": "whole",
        "plan_seed": 0,
        "asynchronous": False,
    }
    return found | changes


FEW_PAGES = {"block_size": 32, "num_gpu_blocks_override": 18}
"""So many that running requests are preempted."""
ENGINES = {
    "embedded": [
        settings(plan="random", args=FEW_PAGES),
        settings(plan="adaptive", asynchronous=True, num_speculative_tokens=5),
    ],
    "dflare": [settings(plan="random", args={"max_num_batched_tokens": 64})],
    "llama": [
        settings(plan="random", num_speculative_tokens=3, args={"scheduling_policy": "priority"})
    ],
}


@pytest.fixture(scope="module", params=ENGINES)
def tally(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tally:
    name, folder = request.param, tmp_path_factory.mktemp("fuzz")
    fuzzer, rng = Fuzzer(name, PAIRS[name](folder), folder), random.Random(5)
    try:
        for engine in ENGINES[name]:
            fuzzer.start(ORDINARY, engine)
            for _ in range(ROUNDS):
                fuzzer.round(draw_round(rng, fuzzer.pair.corpus, ORDINARY | engine))
    finally:
        fuzzer.end()
    print(f"\n{name}: {fuzzer.tally}")
    return fuzzer.tally


def test_no_difference(tally: Tally) -> None:
    """Every answer is plain decoding's, and drafts were accepted meanwhile."""
    assert tally.differences == []
    assert tally.outcomes["alike"] > 50
    assert tally.counters["spec_decode_num_accepted_tokens"] > 20


def test_a_fault_is_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With every draft verified at the temperature of the batch's first request the fuzzer finds
    differences."""
    folder = tmp_path_factory.mktemp("fault")
    fuzzer = Fuzzer("embedded", PAIRS["embedded"](folder), folder)
    fuzzer.most_shrunk = 0  # ``test_fuzzing.py`` sees to that
    engine = settings(fault="one temperature for all")
    try:
        fuzzer.start(ORDINARY, engine)
        rng = random.Random(0)
        while not fuzzer.tally.differences and fuzzer.tally.requests < 300:
            fuzzer.round(draw_round(rng, fuzzer.pair.corpus, ORDINARY | engine))
    finally:
        fuzzer.end()
    assert fuzzer.tally.differences
    assert "--replay" in fuzzer.tally.differences[0]

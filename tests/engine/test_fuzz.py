"""A part of the differential fuzzer with seeds that do not change: random requests, plain decoding against drafts, no difference.

pytest -s tests/engine/test_fuzz.py
python tests/fuzz_differential.py --minutes 30       (much longer, and anything it may draw)
"""

import random

import pytest

from fuzz_differential import ROUNDS, Fuzzer, Tally
from fuzzing.draw import draw_round
from fuzzing.pairs import PAIRS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SEEDS = {"embedded": 3, "dflare": 4, "llama": 5}
ENGINES = {"embedded": 2, "dflare": 1, "llama": 1}


@pytest.fixture(scope="module", params=SEEDS)
def tally(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tally:
    name, folder = request.param, tmp_path_factory.mktemp("fuzz")
    fuzzer = Fuzzer(name, PAIRS[name](folder), folder, SEEDS[name])
    try:
        found = fuzzer.run(range(ROUNDS * ENGINES[name]))
    finally:
        fuzzer.end()
    print(f"\n{name}: {found}")
    return found


def test_no_difference(tally: Tally) -> None:
    """Every answer is plain decoding's, and drafts were accepted meanwhile."""
    assert tally.differences == []
    assert tally.outcomes["alike"] > 50
    assert tally.counters["spec_decode_num_accepted_tokens"] > 50


def test_a_fault_is_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With every draft verified at the temperature of the batch's first request the fuzzer finds differences, and shrinks one."""
    folder = tmp_path_factory.mktemp("fault")
    fuzzer = Fuzzer("embedded", PAIRS["embedded"](folder), folder)
    settings = {
        "args": {"max_num_seqs": 8, "max_num_batched_tokens": 1024}, "num_speculative_tokens": 7, "draft_sample_method": "greedy", "plan": "whole",
        "plan_seed": 0, "asynchronous": False, "fault": "one temperature for all",
    }  # fmt: skip
    try:
        fuzzer.start({"logprobs_mode": "raw_logprobs", "enable_lora": False}, settings)
        rng = random.Random(0)
        while not fuzzer.tally.differences and fuzzer.tally.requests < 300:
            fuzzer.round(draw_round(rng, fuzzer.pair.corpus, settings))
    finally:
        fuzzer.end()
    assert fuzzer.tally.differences
    assert "--replay" in fuzzer.tally.differences[0]

"""A server's counters, and what follows from them."""

import pytest

from vllm_dflash.evaluation.methods import UsageError
from vllm_dflash.evaluation.server import connect, counters, measured

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 10.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 60.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 16.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="m",position="0"} 1.79e+09
vllm:num_preemptions_total{engine="0",model_name="m"} 1.0
vllm:num_requests_running{engine="0",model_name="m"} 0.0
"""
RESULT = {
    "duration": 2.0,
    "completed": 4,
    "total_output_tokens": 50,
    "output_throughput": 25.0,
    "p50_ttft_ms": 1.0,
    "p95_ttft_ms": 2.0,
    "p50_tpot_ms": 3.0,
    "p95_tpot_ms": 4.0,
}
NOTHING = {"per_position": {}}


def test_counters():
    found = counters(METRICS)
    assert found["spec_decode_num_drafts"] == 20
    assert found["num_preemptions"] == 1
    assert found["per_position"] == {0: 16, 1: 10, 2: 4}


def test_whole_drafts_have_conditional_acceptance():
    run = measured(RESULT, NOTHING, counters(METRICS))
    assert run["tau"] == 2.5
    assert run["wasted"] == 30
    assert (run["accepted_at"], run["reached"]) == ([16, 10, 4], [20, 16, 10])


def test_drafts_of_any_length_have_none():
    """Of 20 drafts only 59 tokens were verified: how many drafts had a third one the counters do
    not tell."""
    run = measured(RESULT, NOTHING, counters(METRICS.replace("} 60.0", "} 59.0")))
    assert run["tau"] == 2.5
    assert run["reached"] == []


def test_only_what_was_counted_meanwhile():
    run = measured(RESULT, counters(METRICS), counters(METRICS))
    assert (run["drafts"], run["tau"], run["reached"]) == (0, None, [])


def test_a_server_without_speculation():
    assert measured(RESULT, NOTHING, NOTHING)["tau"] is None


def test_nobody_answers():
    with pytest.raises(UsageError, match="give the address of one"):
        connect("http://127.0.0.1:9")

"""``vllm-dflash bench`` on real engines: its figures agree with each other, and a method that
cannot run is a row with its reason.

pytest tests/engine/test_bench.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.cli import main

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

REQUESTS, MAX_TOKENS, REPEATS, K = 4, 24, 2, 7


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The embedded pair, two requests at a time: two methods that run, one that vLLM refuses, one
    that is not installed."""
    out = tmp_path_factory.mktemp("bench") / "out"
    load = [
        "--concurrency",
        "2",
        "--num-prompts",
        str(REQUESTS),
        "--max-tokens",
        str(MAX_TOKENS),
        "--repeats",
        str(REPEATS),
    ]
    methods = f"plain,dflash:{K},dflash:99,suffix"
    assert (
        main(["bench", "--methods", methods, "--dtype", "float32", "--out", str(out), *load]) == 0
    )
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "logs",
    }
    return json.loads(Path(out, "results.json").read_text())


def test_break_even(tmp_path: Path) -> None:
    """Every draft is made, verified and rejected, at each prompt length; the report says what tau
    that asks for."""
    load = ["--concurrency", "2", "--num-prompts", "2", "--max-tokens", "12", "--repeats", "1"]
    lengths = ["--prompt-tokens", "16,64"]
    out = ["--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main(["bench", "--break-even", *load, *lengths, *out]) == 0
    results = json.loads(Path(tmp_path, "out", "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["plain", "dflash"] * 2
    for run in of(results, "dflash"):
        # A token by chance is the target's once in as many as its vocabulary holds.
        assert run["drafts"] >= 2 * 10
        assert run["verified"] == K * run["drafts"]
        assert run["accepted"] <= 1
        assert run["differing_from_plain"] == 0
    report = Path(tmp_path, "out", "report.md").read_text()
    assert "tau at which drafting breaks even" in report
    assert "| requests at a time | method | 16 tokens | 64 tokens |" in report


def of(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["method"] == method]


def test_every_turn_was_measured(results: dict[str, Any]) -> None:
    assert results["complete"]
    for method in ("plain", f"dflash:{K}"):
        assert [run["repeat"] for run in of(results, method)] == [1, 2]


def test_tokens_and_seconds_agree(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        assert run["tokens"] == REQUESTS * MAX_TOKENS
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
        assert run["committed"] == run["tokens"] - REQUESTS, (
            "all but the first token of each, which its prompt's step yields"
        )
        # A request lives no longer than the run, and most of the run is its share of two.
        assert run["ttft_p50_ms"] + run["tpot_p50_ms"] * (MAX_TOKENS - 1) < 1000 * run["seconds"]
        assert run["step_ms"] * run["steps"] < 2 * 1000 * run["seconds"]
        assert run["preemptions"] == 0


def test_plain_decoding_drafts_nothing(results: dict[str, Any]) -> None:
    """Two at a time, and of a request every token after the first in a step of its own."""
    for run in of(results, "plain"):
        assert run["tau"] is None
        assert (run["drafts"], run["verified"], run["reached"]) == (0, 0, [])
        assert run["committed_per_request_step"] == 1
        assert run["steps"] == REQUESTS // 2 * MAX_TOKENS


def test_counts_of_drafts_agree(results: dict[str, Any]) -> None:
    """The scheduler's outputs, as they were watched, against vLLM's own counters, and against each
    other."""
    for run in of(results, f"dflash:{K}"):
        assert run["agrees_with_vllm"]
        assert run["verified"] == K * run["drafts"] == run["accepted"] + run["wasted"]
        assert run["reached"] == [run["drafts"], *run["accepted_at"][:-1]]
        assert run["accepted"] == sum(run["accepted_at"])
        assert run["tau"] == 1 + run["accepted"] / run["drafts"]
        assert 2 < run["tau"] <= K + 1
        # Tokens past a request's end were accepted and are not committed.
        assert 1 < run["committed_per_request_step"] <= run["tau"]


def test_greedy_output_is_plain_decodings(results: dict[str, Any]) -> None:
    assert [run["differing_from_plain"] for run in of(results, f"dflash:{K}")] == [0, 0]
    assert all(run["differing_from_own_first"] == 0 for run in results["runs"])


def test_each_engine_is_what_it_says(results: dict[str, Any]) -> None:
    plain, dflash, _, _ = (method["engine"] for method in results["methods"])
    assert plain["proposer"] is None
    assert dflash["proposer"].startswith("vllm_dflash.")
    assert plain["dtype"] == dflash["dtype"] == results["settings"]["dtype"] == "float32"


def test_methods_that_cannot_run_are_reported(results: dict[str, Any]) -> None:
    refused, missing = results["methods"][2:]
    assert [m["state"] for m in results["methods"]] == ["ran", "ran", "did not run", "did not run"]
    assert (
        "num_speculative_tokens is 99: this drafter's blocks of 8 hold 1 to 7" in refused["reason"]
    )
    assert "pip install arctic-inference" in missing["reason"]
    assert not any(row["method"] in ("dflash:99", "suffix") for row in results["rows"])

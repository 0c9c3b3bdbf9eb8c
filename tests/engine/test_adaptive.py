"""The controller in a real engine: output stays the target's, seeds hold whatever it chooses, and
the context is fresh after a time off.

pytest -s tests/engine/test_adaptive.py
"""

import json
from pathlib import Path

import pytest
import torch

from engine.forks import Fork
from engine.harness import DRAFTER, TARGET, Batch, held_out_prompts, run_engine, run_engines
from engine.harness import Job as EngineJob
from engine.oracle import compare_drafts
from engine.sampling_harness import Answer, Ask, Engine, run
from engine.test_serve import fork, server
from engine.test_serve import request as ask

pytestmark = pytest.mark.engine
ADAPTIVE = {"additional_config": {"dflash": {"adaptive": True}}}


@pytest.fixture(scope="module")
def batches() -> dict[str, list[Batch]]:
    """Plain decoding of 16 requests at a time, and the controller under loads that rise and fall:
    1, 16, 1 and 4, on one engine."""
    prompts, loads = held_out_prompts(16), (1, 16, 1, 4)
    plain, adaptive = run_engines(
        [
            EngineJob(TARGET, None, prompts, max_tokens=64, batch_sizes=(16,)),
            EngineJob(
                TARGET,
                DRAFTER,
                prompts,
                adaptive=True,
                record=True,
                max_tokens=64,
                batch_sizes=loads,
            ),
        ]
    )
    return {"plain": plain, "adaptive": adaptive}


def test_output_is_plain_decodings(batches: dict[str, list[Batch]]) -> None:
    (plain,) = batches["plain"]
    for adaptive in batches["adaptive"]:
        assert adaptive.tokens == plain.tokens


def test_every_draft_is_made_from_the_whole_context(batches: dict[str, list[Batch]]) -> None:
    """Also the first after steps that drafted nothing, whose context was written late."""
    for batch in batches["adaptive"]:
        agreement = compare_drafts(batch, TARGET, DRAFTER, torch.float32, 7)
        assert agreement.drafts > 20
        assert agreement.differences == []
    assert batches["adaptive"][-1].coverage["missing"] == 0


def test_tau_after_the_load_is_what_it_was_before(batches: dict[str, list[Batch]]) -> None:
    """Of drafts that are verified as far as it pays; it pays to the end with one request at a
    time."""
    before, load, after, _ = batches["adaptive"]
    print(
        f"\ntau with one request {before.tau:.2f}, with 16 {load.tau:.2f}, with one again"
        f" {after.tau:.2f}"
    )
    assert after.tau > 0.9 * before.tau


def test_trials_on_a_busy_machine_verify_what_was_drafted_there() -> None:
    """With drafting off, trials had a tau of 1.14 to 1.26 where whole drafts over the same text
    have 2.25: they fell upon other places of it. Each draft after steps without is the reference's,
    among preempted requests too, and as much of it is accepted as the text says."""
    batch = run_engine(
        TARGET,
        DRAFTER,
        held_out_prompts(16),
        adaptive=True,
        record=True,
        slow_drafts=6.0,
        engine_args={
            "block_size": 32,
            "num_gpu_blocks_override": 24,
            "enable_prefix_caching": False,
        },
    )[0]
    assert batch.report["counters"]["preemptions"] > 0
    assert sum(draft["draft"] == [] for _, draft in batch.drafts) > 200
    agreement = compare_drafts(batch, TARGET, DRAFTER, torch.float32, 7)
    assert agreement.differences == []
    drafted = {(d["request"], d["anchor"]): (tokens, d["draft"]) for tokens, d in batch.drafts}
    for request, anchor, verified, accepted in batch.report["verified"]:
        sequence, draft = drafted[request, anchor]
        right = [a == b for a, b in zip(draft, sequence[anchor + 1 :], strict=False)]
        assert accepted == [*right[:verified], False].index(False), (request, anchor)
    assert len(batch.report["verified"]) > 20


def test_steps_that_draft_for_some_requests_only() -> None:
    """The others verify nothing, and keep their context: once the batch is another one, their
    drafts are the reference's too. Output is plain decoding's."""
    prompts = held_out_prompts(8)
    common = {"max_tokens": 48, "batch_sizes": (4,)}
    [plain], [some] = run_engines(
        [
            EngineJob(TARGET, None, prompts, **common),
            EngineJob(
                TARGET, DRAFTER, prompts, adaptive=True, record=True, skip_requests=(1, 3), **common
            ),
        ]
    )
    assert some.tokens == plain.tokens
    drafted: dict[int, int] = {}
    for _, draft in some.drafts:
        drafted[draft["request"] % 4] = drafted.get(draft["request"] % 4, 0) + bool(draft["draft"])
    assert min(drafted[0], drafted[2]) > 20
    assert drafted[1] == drafted[3] == 0
    agreement = compare_drafts(some, TARGET, DRAFTER, torch.float32, 7)
    assert agreement.drafts > 40
    assert agreement.differences == []
    assert some.coverage["missing"] == 0
    assert {request % 4 for request, *_ in some.report["verified"]} == {0, 2}


def test_steps_are_measured_at_the_first_start_and_read_at_the_second(tmp_path: Path) -> None:
    """More rows take longer, and the drafts that follow are the reference's: nothing of what was
    measured is left behind."""
    settings = {
        "adaptive": True,
        "record": True,
        "max_tokens": 32,
        "env": {"VLLM_CACHE_ROOT": str(tmp_path)},
    }
    batch = run_engine(TARGET, DRAFTER, held_out_prompts(4), **settings)[0]
    assert compare_drafts(batch, TARGET, DRAFTER, torch.float32, 7).differences == []
    (file,) = (tmp_path / "dflash_profiles").iterdir()
    found, written = json.loads(file.read_text())["profile"], file.stat().st_mtime_ns
    at = dict(zip(found["rows"], found["target"], strict=True))
    assert 0 < at[1] < at[64] < at[128]
    print({name: found[name] for name in found})
    run_engine(TARGET, DRAFTER, held_out_prompts(1), **settings)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_scheduler_in_a_process_of_its_own_goes_by_what_was_measured(
    tmp_path: Path, is_kept: bool
) -> None:
    """vLLM gives a worker that it ties to cores another number of threads. Where no file can be
    written, the log says what follows."""
    logs: list[Path] = []

    def start(command: list[str], env: dict[str, str], log: Path) -> Fork:
        logs.append(log)
        return fork(command, env, log)

    env = {"VLLM_CPU_OMP_THREADS_BIND": "auto", "OMP_NUM_THREADS": "2"}
    env["VLLM_CACHE_ROOT"] = str(tmp_path)
    profiles = tmp_path / "dflash_profiles"
    if not is_kept:
        profiles.write_text("")
    flags = ("--speculative-config", json.dumps({"method": "dflash", "model": str(DRAFTER)}))
    with server(*flags, env=env, start=start) as port:
        body = {"model": "embedded", "prompt": "import", "max_tokens": 4}
        ask(port, "/v1/completions", body)
        log = logs[0].read_text()
    if is_kept:
        assert len(list(profiles.iterdir())) == 1
    assert ("adaptive drafting begins with a guess" in log) == (not is_kept)
    assert ("have VLLM_CACHE_ROOT name a folder" in log) == (not is_kept)


def test_fewer_drafts_than_the_block_holds() -> None:
    """A drafter that was trained on whole blocks collapsed in shorter ones: tau 1.04 at K = 3 where
    3.2 are possible. Blocks are whole."""
    batch = run_engine(
        TARGET, DRAFTER, held_out_prompts(8), num_speculative_tokens=3, max_tokens=64, record=True
    )[0]
    agreement = compare_drafts(batch, TARGET, DRAFTER, torch.float32, 3)
    assert agreement.differences == []
    assert batch.tau > 2.5


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Answer]]:
    """Plain and adaptive: requests with seeds (the second twice), and greedy ones that may stop at
    every third token after ``min_tokens``."""
    texts = ["def read_json(path):\n", "class Stack:\n", "import os\n\n\ndef walk(", "for line in "]
    seeds = Ask(
        texts * 4,
        [{"temperature": 1.0, "max_tokens": 48, "ignore_eos": True, "seed": i} for i in range(16)],
    )
    stop = {"temperature": 0.0, "max_tokens": 48, "stop_token_ids": list(range(0, 4096, 3))}
    stops = Ask(texts * 16, [stop | {"min_tokens": 2 + i // 4} for i in range(64)])
    adaptive = Engine(
        TARGET, DRAFTER, [seeds, seeds, stops], num_speculative_tokens=7, args=ADAPTIVE
    )
    plain, ours = run([Engine(TARGET, None, [seeds, stops], together=True), adaptive])
    return {"plain": plain, "ours": ours}


def test_a_seed_gives_what_it_gives_without_a_drafter(answers: dict[str, list[Answer]]) -> None:
    """How much is drafted depends on measured times, so it differs from run to run; what is sampled
    does not."""
    first, again, _ = answers["ours"]
    assert first.tokens == again.tokens == answers["plain"][0].tokens
    assert first.counters["accepted"] > 0


def test_min_tokens_reached_by_drafts(answers: dict[str, list[Answer]]) -> None:
    """vLLM counts committed tokens only, and forbids a stop token after drafts that reach
    ``min_tokens`` too: short drafts met that often."""
    assert answers["ours"][2].tokens == answers["plain"][1].tokens
    assert answers["ours"][2].counters["accepted"] > 0

"""From a target to a proven drafter with real engines: the example at a small scale, killed on the
way, and another family.

The trainer's tau, the reference loop's and vLLM's are the same figure in float32, for Qwen3 and for
Llama.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import forks
from engine.harness import ROOT, TARGET, engine_env, wait_until_gone
from training_runs import answer_held_out, answered_prompts, held_out_file, make_target, settings
from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.decoding import generate
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.sequences import Shard, shard_path
from vllm_dflash.training.settings import STAGES
from vllm_dflash.weights.mask_embedding import read_mask_embedding

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SMALL = [
    "--response-tokens",
    "48",
    "--shard-size",
    "16",
    "--held-out",
    "8",
    "--prove-prompts",
    "8",
    "--prove-tokens",
    "32",
    "--batch-size",
    "8",
    "--anchors",
    "16",
    "--lr",
    "1e-2",
    "--eval-prompts",
    "2",
    "--num-seqs",
    "16",
]


def example(out: Path) -> subprocess.Popen[str]:
    env = engine_env(
        {
            "OUT": str(out),
            "STEPS": "30",
            "PROMPTS": "48",
            "SERVE": "no",
            "BIN": str(Path(sys.executable).parent),
        }
    )
    return subprocess.Popen(
        ["bash", str(ROOT / "examples" / "train_tiny.sh"), *SMALL],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def agreed(run: Path, rows: int) -> dict:
    """The proof's figures, all within 2 % of each other."""
    found = json.loads((run / "prove.json").read_text())
    assert found["agree"]
    assert [row["by"] for row in found["rows"]] == ["reference loop", "vLLM"][:rows]
    for row in found["rows"]:
        assert row["tau"] == pytest.approx(found["trainer_tau"], rel=0.02)
        assert row["walk_tau"] == pytest.approx(row["tau"], rel=0.02)
    return found


def test_the_example_killed_while_the_target_answers(tmp_path: Path) -> None:
    """The first command dies between two shards and takes its engine along; the second does the
    rest, with the answers of plain decoding."""
    first = example(tmp_path)
    while not (tmp_path / "run" / "generate" / "shard-00000.json").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    wait_until_gone(first.pid)
    kept = (tmp_path / "run" / "generate" / "shard-00000.safetensors").stat().st_mtime_ns
    assert not (tmp_path / "run" / "generate" / "shard-00002.json").exists(), (
        "too late: all was answered"
    )
    second = example(tmp_path)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said
    run = tmp_path / "run"
    assert (run / "generate" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    for index in (0, 2):
        one = Shard(shard_path(run / "generate", index))[5]
        prompt, answer = (
            one.tokens[: one.prompt_length].tolist(),
            one.tokens[one.prompt_length :].tolist(),
        )
        assert answer == generate(model, None, prompt, 48, 0).tokens
    found = agreed(run, 2)
    assert found["trainer_tau"] > 1.05
    assert {row["same_text"] for row in found["rows"]} == {8}
    assert DrafterConfig.from_pretrained(run / "drafter").block_size == 8
    card = (run / "drafter" / "README.md").read_text()
    for words in (
        "| vLLM |",
        "48 prompts (prompts.jsonl)",
        "30 steps of 8 sequences x 16 blocks",
        "the tokenizer's mask token",
    ):
        assert words in card
    gains_nothing = found["rows"][-1]["tau"] < 1.1
    assert ("warning: tau is" in said, "It gains nothing yet" in card) == (
        gains_nothing,
        gains_nothing,
    )
    assert "they agree within 2%" in said
    assert (run / "train" / "curves.svg").read_text().count("<svg") == 1


def test_without_prompts_killed_while_the_target_writes_them(tmp_path: Path) -> None:
    """The road without data, on a target without a header in its template; tests/prove_train.py is
    the same on a real chat model."""
    command = [
        str(Path(sys.executable).with_name("vllm-dflash")),
        "train",
        "--target",
        str(TARGET),
        "--prompts",
        "self:24",
        "--out",
        str(tmp_path),
        "--dtype",
        "float32",
        *SMALL,
        "--shard-size",
        "8",
        "--num-seqs",
        "8",
        "--self-most-tokens",
        "24",
        "--self-repetition",
        "1",
        "--response-tokens",
        "16",
        "--prove-tokens",
        "8",
        "--steps",
        "3",
        "--block-size",
        "4",
        "--kind",
        "dflash",
        "--mask-embedding",
        "--skip-vllm",
    ]

    log = tmp_path.with_name("log")

    def start() -> forks.Fork:
        return forks.start(command, engine_env(), {0: Path(os.devnull), 1: log})

    first, part = start(), tmp_path / "prompts" / "shard-00000"
    while not part.with_suffix(".json").exists():
        assert first.runs(), log.read_text()
        time.sleep(0.01)
    first.kill()
    wait_until_gone(first.pid)
    assert not (tmp_path / "prompts" / "prompts.jsonl").exists(), "too late: all was written"
    kept = part.with_suffix(".safetensors").stat().st_mtime_ns
    second = start()
    status, said = second.wait(300), log.read_text()
    assert status == 0, said
    assert part.with_suffix(".safetensors").stat().st_mtime_ns == kept
    assert "24 prompts of" in said
    rows = [
        json.loads(line)
        for line in (tmp_path / "prompts" / "prompts.jsonl").read_text().splitlines()
    ]
    assert len({row["messages"][0]["content"] for row in rows}) == 24
    agreed(tmp_path, 1)
    assert (tmp_path / "drafter" / "mask_embedding.pt").is_file()
    card = (tmp_path / "drafter" / "README.md").read_text()
    for words in (
        "24 that the target wrote itself at temperature 1, top_p 1",
        "its embedding is the drafter's own (mask_embedding.pt)",
    ):
        assert words in card


def test_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A DFlare drafter for a target of another family, with a mask embedding and a draft
    vocabulary of its own, which lacks one of the six tokens that the target says, exported in
    speculators' format."""
    target = make_target(tmp_path / "target")
    held_out, ids = held_out_file(tmp_path / "held-out.jsonl", 8)
    prompts = answered_prompts(target, tmp_path / "prompts.jsonl", 24, 40)
    chosen = settings(
        target,
        prompts,
        tmp_path / "run",
        held_out_prompts=str(held_out),
        held_out=8,
        prove_prompts=8,
        prove_tokens=40,
        steps=40,
        kind="dflare",
        format="speculators",
        response_tokens=40,
        cache=False,
        mask_embedding=True,
        draft_vocab_size=5,
    )
    answer_held_out(chosen, ids)
    assert run_stages(chosen, STAGES), capsys.readouterr().out
    assert agreed(tmp_path / "run", 2)["trainer_tau"] > 1.5
    config = DrafterConfig.from_pretrained(tmp_path / "run" / "drafter")
    assert (config.format, config.kind, config.draft_vocab_size) == ("speculators", "dflare", 5)
    assert (
        "It drafts 5 of the target's 512 tokens"
        in (tmp_path / "run" / "drafter" / "README.md").read_text()
    )
    trained = read_mask_embedding(tmp_path / "run" / "drafter", config)
    row = (
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        .get_input_embeddings()
        .weight[config.mask_token_id]
    )
    assert not torch.allclose(trained, row, atol=0.01)

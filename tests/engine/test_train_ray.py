"""The stage generate by Ray Data: the shards of one engine on this machine, which are plain greedy
decoding; and the cluster's room, however the stage ends."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster_workers import Waiting
from engine.cluster_harness import ray_cluster, wait_until_free
from pairs import random_prompts
from targets import VOCAB
from training_runs import held_out_file, make_target, settings, write_prompts
from vllm_dflash.reference.decoding import generate
from vllm_dflash.training import ray_engines
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import folder_of
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.ray_engines import _gpus_each, answer_on_ray
from vllm_dflash.training.sequences import Shard, shard_path, write_sequences

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_shards_from_ray_data(tmp_path: Path) -> None:
    """A shard that is there already is kept; the others and the held-out one are answered."""
    pytest.importorskip("ray", reason="pip install 'vllm-dflash[ray]'")
    target = make_target(tmp_path / "target")
    held_out, _ = held_out_file(tmp_path / "held-out.jsonl")
    prompts = random_prompts(6, VOCAB)
    written = write_prompts(tmp_path / "prompts.jsonl", ({"prompt_token_ids": p} for p in prompts))
    chosen = settings(
        target,
        written,
        tmp_path / "run",
        held_out_prompts=str(held_out),
        shard_size=2,
        response_tokens=6,
        engines_on_ray=True,
    )
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    plain = [generate(model, None, p, 6, VOCAB - 1).tokens for p in prompts]
    kept = shard_path(folder_of(chosen), 1)
    write_sequences(
        kept, [([*p, *a], len(p)) for p, a in zip(prompts[2:4], plain[2:4], strict=True)]
    )
    before = kept.stat().st_mtime_ns
    run_stages(chosen, ("generate",))
    assert kept.stat().st_mtime_ns == before
    found = [
        shard[i]
        for n in range(3)
        for shard in [Shard(shard_path(folder_of(chosen), n))]
        for i in range(len(shard))
    ]
    assert [sample.tokens[: sample.prompt_length].tolist() for sample in found] == prompts
    for sample, expected in zip(found, plain, strict=True):
        assert sample.tokens[sample.prompt_length :].tolist() == expected


def test_an_engine_that_does_not_start_gives_its_room_back(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'vllm-dflash[ray]'")
    jobs = [{"path": str(tmp_path / "shard"), "count": 1}]
    with ray_cluster(num_cpus=2):
        with pytest.raises(TrainingError, match="an engine on Ray failed"):
            answer_on_ray({"model": str(tmp_path / "nothing")}, jobs, 1, ("answers", "answers"))
        wait_until_free(2)


def test_ctrl_c_gives_the_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine in the middle of a shard, and others that wait."""
    pytest.importorskip("ray", reason="pip install 'vllm-dflash[ray]'")
    monkeypatch.setattr(ray_engines, "_Engine", Waiting)
    monkeypatch.chdir(tmp_path)
    jobs = [{"path": str(tmp_path / f"shard-{i}"), "count": 1} for i in range(6)]

    def interrupt() -> None:
        while not (tmp_path / "waiting").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    with ray_cluster(num_cpus=2):
        pressing = threading.Thread(target=interrupt, daemon=True)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            answer_on_ray({}, jobs, 3, ("answers", "answers"))
        wait_until_free(2)


def test_a_cluster_without_enough_gpus() -> None:
    assert _gpus_each(2, 4, 8) == 2
    assert _gpus_each(2, 4, 0) is None
    with pytest.raises(
        TrainingError,
        match=(
            "engines 8 x tensor_parallel_size 2 need 16 GPUs, and the cluster has 8: lower engines"
        ),
    ):
        _gpus_each(2, 8, 8)

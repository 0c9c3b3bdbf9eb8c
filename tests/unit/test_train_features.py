"""Cached features are the target's own, and neither writing nor reading them holds more in memory
than is said; measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from training_runs import (
    answer_held_out,
    held_out_file,
    in_child,
    make_target,
    settings,
    write_prompts,
)
from vllm_dflash.training import drafter, features, generate, target
from vllm_dflash.training.settings import Settings

pytestmark = pytest.mark.slow

BATCH, TOKENS = 4, 128
_SLACK = 24 << 20
"""What a forward of the tiny target itself, the allocator and the interpreter may take."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Answers of which the features are many times what may be in memory; random ones, for nothing
    is trained here."""
    folder = tmp_path_factory.mktemp("features")
    model = make_target(folder / "target")
    rng = np.random.default_rng(0)
    rows = (
        {
            "prompt_token_ids": rng.integers(2, 500, 28).tolist(),
            "response_token_ids": rng.integers(2, 500, n).tolist(),
        }
        for n in range(90, 101)
        for _ in range(100)
    )
    held_out, ids = held_out_file(folder / "held-out.jsonl")
    chosen = settings(
        model,
        write_prompts(folder / "prompts.jsonl", rows),
        folder / "run",
        held_out_prompts=str(held_out),
        shard_size=600,
        response_tokens=100,
    )
    answer_held_out(chosen, ids)
    found = target.find_target(chosen)
    generate.generate(chosen, chosen.data, None, found.shape.vocab_size, found.dtype, 1024)
    return chosen


def parts(chosen: Settings):
    found = target.find_target(chosen)
    return drafter.plan(chosen, found)[0], found, target.load_target(found, chosen, "cpu")


def peak(work) -> int:
    """Bytes by which the resident memory rose above where it was."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def test_memory_is_bounded(run: Settings) -> None:
    """Writing them all, then reading them all in batches."""

    def work() -> str:
        torch.set_num_threads(1)
        config, found, model = parts(run)
        data = generate.sequences(run)
        writing = peak(lambda: features.cache(run, config, found, model))
        reader = features.Features(run, data, config, found, model)
        tokens = torch.zeros(BATCH, TOKENS, dtype=torch.int64)

        def read() -> None:
            for at in range(0, len(data), BATCH):
                reader(range(at, at + BATCH), tokens)

        reading = peak(read)
        return f"{writing} {reading}"

    writing, reading = map(int, in_child(work).split())
    config, found, _ = parts(run)
    bound = features.bytes_in_memory(config, found.dtype, BATCH, TOKENS)
    size = sum(p.stat().st_size for p in features.folder_of(run).glob("*.safetensors"))
    print(
        f"{size >> 20} MB of features: {writing >> 20} MB more while writing, {reading >> 20} while"
        f" reading; features' bound {bound >> 10} KB"
    )
    assert size > 2 * (bound + _SLACK)
    assert writing < bound + _SLACK
    assert reading < bound + _SLACK


def test_they_are_the_targets_own(run: Settings) -> None:
    """By transformers' own hidden_states, one sequence at a time: entry i + 1 is the output of
    layer i."""
    config, found, model = parts(run)
    features.cache(run, config, found, model)
    data = generate.sequences(run)
    reader = features.Features(run, data, config, found, model)
    numbers = [0, 599, 600, 1099]
    rows = [data[n].tokens for n in numbers]
    read = reader(numbers, features.padded(rows, 64))
    hf = AutoModelForCausalLM.from_pretrained(run.run.target, dtype=torch.float32)
    for row, tokens in zip(read, rows, strict=True):
        with torch.no_grad():
            states = hf(
                torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True
            ).hidden_states
        expected = torch.cat([states[i + 1][0] for i in config.target_layer_ids], dim=-1)
        assert torch.allclose(row[: len(tokens)], expected, atol=1e-4)
        assert not row[len(tokens) :].any()

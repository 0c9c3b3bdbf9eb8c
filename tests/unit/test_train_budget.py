"""What a run will take is computed before it begins: for Qwen3-8B's shape, against figures worked
out by hand."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pairs import random_drafter_config
from training_runs import settings
from vllm_dflash.config import DrafterConfig
from vllm_dflash.pairing import default_target_layer_ids
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.training.budget import as_text, budget
from vllm_dflash.training.optimizer import Optimizer
from vllm_dflash.training.tables import Train

QWEN3_8B = dict(
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    block_size=16,
    mask_token_id=151669,
    num_target_layers=36,
    max_position_embeddings=40960,
    kind="dflash",
)


def test_an_8b_target() -> None:
    """DFlash's fc reads five layers; attention and MLP of a draft layer are Qwen3-8B's, 193 M
    parameters."""
    config = DrafterConfig(
        **QWEN3_8B, num_hidden_layers=5, target_layer_ids=default_target_layer_ids(5, 36)
    )
    flags = dict(
        dtype="bfloat16",
        max_prompt_tokens=200,
        response_tokens=600,
        steps=None,
        epochs=6,
        batch_size=64,
        anchors=128,
        optimizer="adamw",
        cache=False,
    )
    found = budget(
        settings(Path("t"), Path("p"), Path("o"), **flags), config, 8_190_000_000, 200_000
    )
    layer = 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 12288
    assert found.parameters == pytest.approx(5 * layer + 5 * 4096**2, rel=1e-3)
    assert found.steps == 18750
    assert found.generated_tokens == 120_000_000
    assert found.optimizer_bytes == pytest.approx(16 * found.parameters)
    assert found.cache_bytes == 200_000 * 800 * 5 * 4096 * 2
    queries = 1_200_000 * 128 * 16
    assert found.drafter_operations == pytest.approx(
        queries * (6 * 5 * layer + 4 * 151936 * 4096), rel=0.05
    )
    assert found.target_operations == pytest.approx(2 * 8.19e9 * 1_200_000 * 800)
    assert 20 < found.hours(4e14) < 30
    assert found.operations == found.target_operations + found.drafter_operations


@pytest.mark.parametrize("kind", ["dflash", "dflare"])
def test_what_muon_multiplies(kind: str) -> None:
    """More than a quarter of a step of SmolLM2's drafter with 256 blocks: torch counts what
    its optimizer does."""
    config = random_drafter_config(kind=kind)
    flags = dict(kind=kind, optimizer="muon", steps=7)
    found = budget(settings(Path("t"), Path("p"), Path("o"), **flags), config, 1000, 16)
    drafter = new_drafter(config).float()
    for parameter in drafter.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counted:
        Optimizer(drafter, Train(optimizer="muon"), 7).step(0, 1.0)
    assert found.optimizer_operations == 7 * counted.get_total_flops() > 0
    adamw = budget(
        settings(Path("t"), Path("p"), Path("o"), **flags | dict(optimizer="adamw")),
        config,
        1000,
        16,
    )
    assert adamw.optimizer_operations == 0
    assert adamw.operations == found.operations - found.optimizer_operations


def test_hours_are_those_of_what_trains() -> None:
    """On two cores it said "0.0 hours at 400 TFLOP/s a worker" for a night's work."""
    flags = dict(dtype="bfloat16", steps=4000, batch_size=32, anchors=32, optimizer="muon")
    config = DrafterConfig(
        **QWEN3_8B, num_hidden_layers=5, target_layer_ids=default_target_layer_ids(5, 36)
    )
    found = budget(settings(Path("t"), Path("p"), Path("o"), **flags), config, 1000, 16)
    on_gpus, on_cores = as_text(found, 2, None), as_text(found, 1, 2)
    assert f"{found.operations / 8e14 / 3600:,.1f} hours at 400 TFLOP/s a worker" in on_gpus
    hours = f"{found.operations / 1.6e11 / 3600:,.1f} hours at 80 GFLOP/s a core, 2 of them"
    assert hours in on_cores
    assert "Muon's" in on_cores

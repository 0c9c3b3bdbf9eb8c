"""What a run will take is computed before it begins: for Qwen3-8B's shape, against figures worked
out by hand."""

from pathlib import Path

import pytest

from training_runs import settings
from vllm_dflash.config import DrafterConfig, default_target_layer_ids
from vllm_dflash.training.budget import budget

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

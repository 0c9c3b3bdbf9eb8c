"""The target's layers as our class runs them compute what vLLM's modules compute, to the last bit:
hidden states, features, keys and values.

pytest tests/engine/test_target_layers.py
"""

from pathlib import Path
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_worker
from pairs import make_random_drafter, random_drafter_config, random_prompts
from targets import EXTENDING_LLAMA, FAMILIES, VOCAB

pytestmark = pytest.mark.engine
DTYPES = ("float32", "bfloat16", "float16")
SMOLLM2: dict[str, Any] = dict(
    hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64
)
LLAMAS: dict[str, dict[str, Any]] = {
    "llama, biases, windows, scaled positions": {
        "attention_bias": True,
        "mlp_bias": True,
        "layer_types": ["sliding_attention"] * 5,
        "sliding_window": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama, tied, SmolLM2's heads": SMOLLM2 | {"tie_word_embeddings": True},
}
"""What their configs say."""
WEIGHTS = ("qwen3, trained", "qwen3, random", *LLAMAS)


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, random_target: Path, random_drafter: Path
) -> dict[tuple[str, str], dict[str, int]]:
    """By weights and dtype what was counted; prompts come in pieces of 64 tokens, beside requests
    that decode."""
    folder, prompts = tmp_path_factory.mktemp("layers"), random_prompts(6, VOCAB)
    smollm2 = make_random_drafter(folder / "drafter", config=random_drafter_config(**SMOLLM2))
    asked: dict[str, tuple[Path, Path, list[list[int]]]] = {
        "qwen3, trained": (TARGET, DRAFTER, held_out_prompts(6)),
        "qwen3, random": (random_target, random_drafter, prompts),
    }
    for name, changes in LLAMAS.items():
        target = FAMILIES["llama"].make(folder / f"llama-{len(asked)}", spoken=VOCAB, **changes)
        drafter = smollm2 if SMOLLM2.items() <= changes.items() else random_drafter
        asked[name] = target, drafter, prompts
    kinds = [(name, dtype) for dtype in DTYPES for name in asked]
    for name, family in EXTENDING_LLAMA.items():
        asked[name] = family.make(folder / name), random_drafter, prompts[:1]
        kinds.append((name, DTYPES[0]))
    jobs = [
        dict(zip(("target", "drafter"), map(str, asked[name][:2]), strict=True))
        | {"prompts": asked[name][2], "dtype": dtype}
        for name, dtype in kinds
    ]
    return dict(zip(kinds, run_worker("target_layers_worker.py", jobs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_step_is_the_modules(
    seen: dict[tuple[str, str], dict[str, int]], weights: str, dtype: str
) -> None:
    counts = seen[weights, dtype]
    assert counts["steps"] >= 20
    assert counts["by modules"] == 0
    assert counts["rows"] >= 48
    assert counts["features"] >= 2
    assert counts["outputs differ"] == 0
    assert counts["caches differ"] == 0


@pytest.mark.parametrize("name", EXTENDING_LLAMA)
def test_what_extends_an_architecture_keeps_the_modules(
    seen: dict[tuple[str, str], dict[str, int]], name: str
) -> None:
    """Nothing was proved of it."""
    assert seen[name, DTYPES[0]]["ours"] == 0

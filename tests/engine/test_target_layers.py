"""The target's layers as our class runs them compute what vLLM's modules compute, to the last bit:
hidden states, features, keys and values.

pytest tests/engine/test_target_layers.py
"""

from pathlib import Path
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_worker
from pairs import random_prompts

pytestmark = pytest.mark.engine
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def seen(random_target: Path, random_drafter: Path) -> dict[tuple[str, str], dict[str, int]]:
    """By weights and dtype what was counted; prompts come in pieces of 64 tokens, beside requests
    that decode."""
    jobs: dict[tuple[str, str], dict[str, Any]] = {}
    for dtype in DTYPES:
        jobs["trained", dtype] = {
            "target": str(TARGET),
            "drafter": str(DRAFTER),
            "prompts": held_out_prompts(6),
            "dtype": dtype,
        }
        jobs["random", dtype] = {
            "target": str(random_target),
            "drafter": str(random_drafter),
            "prompts": random_prompts(6, 512),
            "dtype": dtype,
        }
    return dict(zip(jobs, run_worker("target_layers_worker.py", list(jobs.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["trained", "random"])
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

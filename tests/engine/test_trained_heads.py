"""Heads that were trained for a moment, in real V1 engines: drafts and tau are the reference's, and
output is the target's whatever the controller makes of a head's confidences.

    pytest tests/engine/test_trained_heads.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.harness import Batch, Job, run_engines
from engine.oracle import compare_bfloat16, compare_drafts
from pairs import make_random_target, random_drafter_config
from trained import continued, train_briefly
from variants import VARIANTS
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import replay_drafts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NAMES = ("dflash2 convolution", "dspark", "dflare candidates convolution", "lilicorr")
PROMPTS = [[i, 3 * i, 7 * i % 500, 11] for i in range(2, 18)]
NEW_TOKENS = 48
SAMPLED = {"temperature": 0.8, "seed": 7}
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"adaptive": True},
    {"dtype": "bfloat16"},
    {"adaptive": True, "sampling": SAMPLED},
)
"""Of each drafter, what its engines have of their own."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_target(tmp_path_factory.mktemp("heads") / "target", scale=0.25)


@pytest.fixture(scope="module")
def drafters(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {
        name: train_briefly(
            target,
            folder / name.replace(" ", "-"),
            random_drafter_config(**VARIANTS[name].changes),
            PROMPTS,
            NEW_TOKENS,
            steps=60,
            blocks=6,
        )
        for name in NAMES
    }


@pytest.fixture(scope="module")
def served(target: Path, drafters: dict[str, Path]) -> dict[str, list[Batch]]:
    """By drafter an engine for each of ``RUNS``; under ``plain`` the target's own, greedy and
    sampled."""
    jobs = [
        Job(
            target,
            drafter,
            PROMPTS,
            num_speculative_tokens=VARIANTS[name].tokens,
            max_tokens=NEW_TOKENS,
            batch_sizes=(8,),
            record=not changes.get("adaptive"),
            **changes,
        )
        for name, drafter in drafters.items()
        for changes in RUNS
    ]
    plain = [
        Job(target, None, PROMPTS, max_tokens=NEW_TOKENS, sampling=sampling)
        for sampling in ({}, SAMPLED)
    ]
    batches = [b[0] for b in run_engines([*jobs, *plain])]
    count = len(RUNS)
    found = {name: batches[count * i : count * (i + 1)] for i, name in enumerate(NAMES)}
    return found | {"plain": batches[-2:]}


def tau_of_the_reference(model: Any, drafter: Any, k: int) -> float:
    """As of ``generate`` for each prompt: every place of the target's own text is drafted at in one
    pass, and then gone through as the loop goes."""
    steps = taken = 0
    for tokens in continued(model, PROMPTS, NEW_TOKENS + k).tolist():
        at, end = len(PROMPTS[0]), len(PROMPTS[0]) + NEW_TOKENS - 1
        drafts = {d.anchor: d for d in replay_drafts(model, drafter, tokens, range(at, end), k)}
        while at < end:
            drafted = drafts[at].tokens
            right = [a == b for a, b in zip(drafted, tokens[at + 1 :], strict=False)]
            accepted = [*right, False].index(False)
            steps, taken, at = steps + 1, taken + accepted, at + accepted + 1
    return 1 + taken / steps


@pytest.mark.parametrize("name", NAMES)
def test_drafts_and_tau_are_the_references(
    target: Path, drafters: dict[str, Path], served: dict[str, list[Batch]], name: str
) -> None:
    batch, k = served[name][0], VARIANTS[name].tokens
    agreement = compare_drafts(batch, target, drafters[name], torch.float32, k)
    assert agreement.drafts >= 100
    assert agreement.differences == []
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    drafter = load_drafter(drafters[name], torch.float32)
    reference = tau_of_the_reference(model, drafter, k)
    print(f"\n{name}: tau of the reference loop {reference:.3f}, served {batch.tau:.3f}")
    assert reference > 1.5, "drafts are accepted, or the comparison says nothing"
    assert abs(batch.tau / reference - 1) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_targets_with_the_controller_too(
    served: dict[str, list[Batch]], name: str
) -> None:
    """Sampled too: on a CPU a seed gives what it gives without a drafter."""
    fixed, adaptive, _, sampled = served[name]
    assert fixed.tokens == adaptive.tokens == served["plain"][0].tokens
    assert sampled.tokens == served["plain"][1].tokens
    assert sampled.tokens != fixed.tokens


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_drafts_are_as_near_as_the_references(
    target: Path, drafters: dict[str, Path], served: dict[str, list[Batch]], name: str
) -> None:
    """To the float32 reference's, as the reference's own in bfloat16 are, to 1 %."""
    ours, reference = compare_bfloat16(
        served[name][2], target, drafters[name], VARIANTS[name].tokens
    )
    print(
        f"\n{name}, {ours.tokens} tokens: engine {ours.share:.4f}, reference {reference.share:.4f}"
    )
    assert ours.drafts >= 100
    assert ours.share >= reference.share - 0.01

"""DFlare as DFlash is tested: draft parity, tau parity and invariance, with five target layers and
four draft layers.

The drafter is trained for a moment, so that drafts are accepted in all lengths and tau says
something.

    pytest tests/engine/test_dflare.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.harness import Batch, Job, run_engine, run_engines
from engine.oracle import BFLOAT16_GAP, compare_bfloat16, compare_drafts, compare_rounded
from engine.rounding import AT_LEAST
from pairs import make_random_drafter, make_random_target, random_drafter_config, random_prompts
from trained import train_briefly
from variants import VARIANTS
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import generate

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = [[i, 3 * i, 7 * i % 500, 11] for i in range(2, 26)]
NEW_TOKENS = 48
FLOAT32, BATCH_8, RESCALED, BFLOAT16, PLAIN = range(5)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_target(tmp_path_factory.mktemp("dflare") / "target", scale=0.25)


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = random_drafter_config(
        kind="dflare", num_hidden_layers=4, target_layer_ids=(0, 1, 2, 3, 4)
    )
    return train_briefly(
        target, tmp_path_factory.mktemp("dflare") / "drafter", config, PROMPTS, NEW_TOKENS, steps=45
    )


@pytest.fixture(scope="module")
def served(target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    rescaled = rescale(drafter, tmp_path_factory.mktemp("dflare") / "rescaled")
    jobs = [
        Job(target, drafter, PROMPTS, max_tokens=NEW_TOKENS, batch_sizes=(1,), record=True),
        Job(target, drafter, PROMPTS, max_tokens=NEW_TOKENS, batch_sizes=(8,), record=True),
        Job(target, rescaled, PROMPTS, max_tokens=NEW_TOKENS, batch_sizes=(8,)),
        Job(target, drafter, PROMPTS, max_tokens=NEW_TOKENS, dtype="bfloat16", record=True),
        Job(target, None, PROMPTS, max_tokens=NEW_TOKENS),
    ]
    return [batches[0] for batches in run_engines(jobs)]


def rescale(drafter: Path, folder: Path) -> Path:
    """Layer i's k_norm times 3^i / 2 and its q_norm divided by the same: attention scores stay as
    they are."""
    shutil.copytree(drafter, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("k_norm.weight")]:
        factor = 3.0 ** int(name.split(".")[1]) / 2
        tensors[name] *= factor
        tensors[name.replace("k_norm", "q_norm")] /= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("index", [FLOAT32, BATCH_8], ids=["batch 1", "batch 8"])
def test_drafts_are_the_references(
    served: list[Batch], target: Path, drafter: Path, index: int
) -> None:
    agreement = compare_drafts(served[index], target, drafter, torch.float32, 7)
    assert agreement.drafts >= 200
    assert agreement.differences == []


def test_bfloat16_drafts_are_the_references(
    served: list[Batch], target: Path, drafter: Path
) -> None:
    """99 % are, outright, those of plain PyTorch that rounds alike; and they are as near to the
    float32 reference's as the reference's own in bfloat16 are, to 1 %."""
    ours, reference = compare_bfloat16(served[BFLOAT16], target, drafter, 7)
    print(
        f"\nbfloat16, {ours.tokens} tokens that agree with float32: engine {ours.share:.4f},"
        f" reference {reference.share:.4f}"
    )
    assert ours.drafts >= 200
    assert ours.share >= reference.share - 0.01
    agreement = compare_rounded(served[BFLOAT16], target, drafter, 7)
    print(
        f"with plain PyTorch that rounds alike: {agreement.share:.4f} of {agreement.tokens}"
        " outright"
    )
    assert agreement.share >= AT_LEAST
    assert agreement.share_beyond(BFLOAT16_GAP) >= 0.99


def test_random_bfloat16_drafts_are_the_references(random_target: Path, tmp_path: Path) -> None:
    drafter = make_random_drafter(
        tmp_path / "drafter", config=random_drafter_config(**VARIANTS["dflare"].changes), seed=2
    )
    batch = run_engine(
        random_target,
        drafter,
        random_prompts(16, 512),
        dtype="bfloat16",
        max_tokens=24,
        record=True,
    )[0]
    agreement = compare_rounded(batch, random_target, drafter, 7)
    print(
        f"\nrandom weights, with plain PyTorch that rounds alike: {agreement.share:.4f} of"
        f" {agreement.tokens} outright"
    )
    assert agreement.drafts >= 200
    assert agreement.share >= AT_LEAST
    assert agreement.share_beyond(BFLOAT16_GAP) >= 0.99


def test_tau_is_the_reference_loops(served: list[Batch], target: Path, drafter: Path) -> None:
    model, draft_model = (
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32),
        load_drafter(drafter, torch.float32),
    )
    loops = [generate(model, draft_model, prompt, NEW_TOKENS, 7) for prompt in PROMPTS]
    reference = 1 + sum(s.accepted for g in loops for s in g.steps) / sum(
        len(g.steps) for g in loops
    )
    print(
        f"\ntau: reference loop {reference:.3f}, served {served[FLOAT32].tau:.3f} at batch 1,"
        f" {served[BATCH_8].tau:.3f} at batch 8"
    )
    assert reference > 1.5, "drafts are accepted, or the comparison says nothing"
    assert abs(served[FLOAT32].tau / reference - 1) < 0.02
    assert abs(served[BATCH_8].tau / reference - 1) < 0.02


def test_tau_stays_when_norms_are_rescaled(served: list[Batch]) -> None:
    print(f"\ntau: as trained {served[BATCH_8].tau:.3f}, rescaled {served[RESCALED].tau:.3f}")
    assert abs(served[RESCALED].tau / served[BATCH_8].tau - 1) < 0.01


def test_output_is_the_targets(served: list[Batch]) -> None:
    assert (
        served[FLOAT32].tokens
        == served[BATCH_8].tokens
        == served[RESCALED].tokens
        == served[PLAIN].tokens
    )

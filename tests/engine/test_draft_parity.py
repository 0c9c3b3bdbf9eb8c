"""What a real V1 engine drafts is what the plain PyTorch reference drafts, token for token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.harness import (
    DFLARE,
    DRAFTER,
    TARGET,
    Batch,
    Job,
    held_out_prompts,
    run_engine,
    run_engines,
)
from engine.oracle import BFLOAT16_GAP, compare_bfloat16, compare_drafts, compare_rounded
from engine.rounding import AT_LEAST
from pairs import make_random_drafter, random_drafter_config, random_prompts
from variants import VARIANTS
from vllm_dflash.config import DrafterConfig

pytestmark = pytest.mark.engine
LIMIT = 64
"""``max_model_len`` where blocks meet it."""
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "target_layer_ids",
    "num_target_layers",
    "max_position_embeddings",
    "rope_theta",
)
"""What a drafter for the same target has in common with another."""


@pytest.fixture(scope="module")
def served(random_target: Path, random_drafter: Path) -> dict[str, list[Batch]]:
    """Engines of the random pair, in one process."""
    prompts = random_prompts(16, 512)
    whole = Job(random_target, random_drafter, prompts, max_tokens=24, record=True)
    near_the_end = Job(
        random_target,
        random_drafter,
        [p[:20] for p in random_prompts(6, 512)] + [list(range(2, 52))],
        max_tokens=40,
        max_model_len=LIMIT,
        record=True,
    )
    shared = prompts[0][:2] * 140
    jobs = {
        "7 tokens": whole,
        "3 tokens": replace(whole, num_speculative_tokens=3),
        "bfloat16": replace(whole, dtype="bfloat16"),
        "near the end": near_the_end,
        "near the end, plain": replace(near_the_end, drafter=None, record=False),
        "in pieces": replace(
            whole,
            prompts=[shared + [i] * 5 for i in range(2, 8)],
            max_tokens=16,
            batch_sizes=(2, 6),
            engine_args={"max_num_batched_tokens": 48, "enable_prefix_caching": True},
        ),
    }
    return dict(zip(jobs, run_engines(list(jobs.values())), strict=True))


@pytest.mark.parametrize("index", [0, 1, 2], ids=["batch 1", "batch 4", "batch 16"])
def test_trained_float32(dflash_float32: list[Batch], index: int) -> None:
    agreement = compare_drafts(dflash_float32[index], TARGET, DRAFTER, torch.float32, 7)
    assert agreement.drafts >= 200
    assert agreement.differences == []


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Batch]]:
    """vLLM's default, target and drafter through torch.compile: the embedded drafter, and one with
    a convolution for the same target. In one process, so that what they share is compiled once."""
    theirs = DrafterConfig.from_pretrained(DRAFTER)
    like_it = {name: getattr(theirs, name) for name in SHAPE} | {"num_hidden_layers": 2}
    config = random_drafter_config(**VARIANTS["dflash2 convolution"].changes | like_it)
    convolution = make_random_drafter(tmp_path_factory.mktemp("c") / "drafter", config=config)
    trained = Job(
        TARGET,
        DRAFTER,
        held_out_prompts(16),
        max_tokens=64,
        record=True,
        engine_args={"enforce_eager": False},
    )
    other = replace(trained, drafter=convolution, prompts=held_out_prompts(8), max_tokens=16)
    (one,), (two,) = run_engines([trained, other])
    return {"trained": (DRAFTER, one), "convolution": (convolution, two)}


@pytest.mark.parametrize(("name", "at_least"), [("trained", 200), ("convolution", 80)])
def test_float32_compiled(
    compiled: dict[str, tuple[Path, Batch]], name: str, at_least: int
) -> None:
    drafter, batch = compiled[name]
    agreement = compare_drafts(batch, TARGET, drafter, torch.float32, 7)
    assert agreement.drafts >= at_least
    assert agreement.differences == []


def check_bfloat16(batch: Batch, target: Path, drafter: Path) -> None:
    """Of an engine's drafts in bfloat16 99 % are, outright, those of plain PyTorch that rounds
    where the engine does; and they are as near to the float32 reference's as the reference's own in
    bfloat16 are, to 1 %."""
    served, reference = compare_bfloat16(batch, target, drafter, 7)
    gaps = [f"{gap:.4f}" for gap in sorted(served.differences)]
    print(
        f"\nbfloat16, {served.tokens} draft tokens that agree with the float32 reference: engine"
        f" {served.share:.4f}, reference {reference.share:.4f}; relative logit gaps where the"
        f" engine's do not: {', '.join(gaps)}"
    )
    assert served.drafts >= 200
    assert served.share >= reference.share - 0.01
    agreement = compare_rounded(batch, target, drafter, 7)
    print(
        f"with plain PyTorch that rounds alike: {agreement.share:.4f} outright; largest relative"
        f" gap {max(agreement.differences, default=0):.4f}"
    )
    assert agreement.share >= AT_LEAST
    assert agreement.share_beyond(BFLOAT16_GAP) >= 0.99


def test_trained_bfloat16(dflash_bfloat16: Batch) -> None:
    check_bfloat16(dflash_bfloat16, TARGET, DRAFTER)


@pytest.mark.parametrize("num_speculative_tokens", [7, 3])
def test_random_weights_float32(
    served: dict[str, list[Batch]],
    random_target: Path,
    random_drafter: Path,
    num_speculative_tokens: int,
) -> None:
    """Random norms in each layer, GQA, an untied lm_head: a wrong weight anywhere changes
    drafts."""
    (batch,) = served[f"{num_speculative_tokens} tokens"]
    agreement = compare_drafts(
        batch, random_target, random_drafter, torch.float32, num_speculative_tokens
    )
    assert agreement.drafts >= 200
    assert agreement.differences == []


def test_random_weights_bfloat16(
    served: dict[str, list[Batch]], random_target: Path, random_drafter: Path
) -> None:
    """With random weights the two best logits are often closer than bfloat16 can tell apart."""
    check_bfloat16(served["bfloat16"][0], random_target, random_drafter)


def test_blocks_end_at_max_model_len(
    served: dict[str, list[Batch]], random_target: Path, random_drafter: Path
) -> None:
    """Near the end a block has fewer positions, for that request alone: the others in the batch
    draft whole blocks.

    vLLM's own test asks whether the longest sequence leaves room for a whole block. Where it does
    not, no request gets its context written in that step, and all draft zeros from then on with
    holes in what they attend to.
    """
    (batch,), (plain,) = served["near the end"], served["near the end, plain"]
    assert batch.tokens == plain.tokens
    assert len(batch.tokens[-1]) == LIMIT - 50
    agreement = compare_drafts(
        batch, random_target, random_drafter, torch.float32, 7, max_model_len=LIMIT
    )
    assert agreement.differences == []


def test_chunked_prefill_and_prefix_cache(
    served: dict[str, list[Batch]], random_target: Path, random_drafter: Path
) -> None:
    """A prompt that is prefilled in pieces, and one whose pages come from the prefix cache, leave
    no hole in the context."""
    batches = served["in pieces"]
    assert batches[1].report["counters"]["prefix_cache_hits"] >= 6 * 128, (
        "pages of 128 tokens on a CPU: each prompt starts with one at least"
    )
    for batch in batches:
        agreement = compare_drafts(batch, random_target, random_drafter, torch.float32, 7)
        assert agreement.drafts > 20
        assert agreement.differences == []


def test_tau_equals_the_reference_loop(dflash_float32: list[Batch]) -> None:
    """Served tau is within 2 % of the reference loop's on the same prompts, at batch 1 and at batch
    8."""
    from transformers import AutoModelForCausalLM

    from vllm_dflash.reference.checkpoint import load_drafter
    from vllm_dflash.reference.decoding import generate

    target, drafter = (
        AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32),
        load_drafter(DRAFTER, torch.float32),
    )
    prompts = held_out_prompts(12)
    loops = [generate(target, drafter, p, 128, 7) for p in prompts]
    reference = 1 + sum(s.accepted for g in loops for s in g.steps) / sum(
        len(g.steps) for g in loops
    )
    served = run_engine(TARGET, DRAFTER, prompts, batch_sizes=(1, 8))
    print(
        f"\ntau: reference loop {reference:.3f}, served {served[0].tau:.3f} at batch 1 and"
        f" {served[1].tau:.3f} at batch 8"
    )
    for batch in served:
        assert abs(batch.tau / reference - 1) < 0.02


def test_tau_of_the_embedded_pair(dflash_float32: list[Batch]) -> None:
    """Greedy, block size 8, 64 held-out prompts x 128 tokens."""
    print(
        f"\ntau of the embedded pair: {', '.join(f'{b.tau:.2f}' for b in dflash_float32)} at batch"
        " 1, 4 and 16"
    )
    assert all(batch.tau >= 3.5 for batch in dflash_float32)


def test_embedded_dflare(dflash_float32: list[Batch], prompts: list[list[int]]) -> None:
    """The DFlare drafter beside it, conditioned on all eight target layers: drafts, output (the
    target's own, test_lossless.py) and tau."""
    batch = run_engine(TARGET, DFLARE, prompts, batch_sizes=(16,), record=True)[0]
    agreement = compare_drafts(batch, TARGET, DFLARE, torch.float32, 7)
    print(f"\ntau of the embedded DFlare: {batch.tau:.2f}, {agreement.tokens} draft tokens")
    assert batch.tokens == dflash_float32[0].tokens
    assert agreement.drafts >= 200
    assert agreement.differences == []
    assert batch.tau >= 3.5

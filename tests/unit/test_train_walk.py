"""The trainer's tau is decoding's: the walk counts what the reference loop counts, draft for
draft."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pairs import random_prompts
from targets import HIDDEN, VOCAB
from trained import train_briefly
from training_runs import MASK, make_target
from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import generate
from vllm_dflash.training.walk import accepted_everywhere, estimate, walk

pytestmark = pytest.mark.slow

TOKENS, SIZE = 30, 4


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A target and a drafter that was trained for a moment."""
    folder: Path = tmp_path_factory.mktemp("walk")
    target = make_target(folder / "target", request.param)
    config = DrafterConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        block_size=SIZE,
        mask_token_id=MASK,
        target_layer_ids=(1, 3),
        num_target_layers=5,
        max_position_embeddings=512,
        dtype="float32",
        kind="dflash",
    )
    train_briefly(
        target,
        folder / "drafter",
        config,
        [p[:20] for p in random_prompts(40, VOCAB) if len(p) >= 20],
        40,
        30,
    )
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).requires_grad_(False)
    return model, load_drafter(folder / "drafter", torch.float32)


def decoded(model, drafter, prompts, eos):
    return [generate(model, drafter, p, TOKENS, SIZE - 1, eos) for p in prompts]


@pytest.mark.parametrize("stops", [False, True])
def test_the_walk_is_decoding(pair, stops: bool) -> None:
    """With and without an end token in the text; the answers go on past it, as the stage generate
    writes them."""
    model, drafter = pair
    prompts = random_prompts(12, VOCAB)
    answers = [generate(model, None, p, TOKENS + SIZE, 0).tokens for p in prompts]
    eos = answers[0][TOKENS // 2] if stops else None
    runs = decoded(model, drafter, prompts, eos)
    assert any(len(run.tokens) < TOKENS for run in runs) == stops
    for prompt, answer, run in zip(prompts, answers, runs, strict=True):
        tokens = [*prompt, *answer]
        found = walk(
            accepted_everywhere(model, drafter, tokens, len(prompt)),
            tokens,
            len(prompt),
            TOKENS,
            eos,
        )
        assert found.accepted == [step.accepted for step in run.steps]
    whole = estimate(
        model,
        drafter,
        [([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)],
        TOKENS,
        eos,
    )
    accepted = [step.accepted for run in runs for step in run.steps]
    assert whole.tau == pytest.approx(1 + sum(accepted) / len(accepted))
    assert 1.2 < whole.tau < SIZE
    assert whole.acceptance.per_position == [sum(n > i for n in accepted) for i in range(SIZE - 1)]


def test_a_mean_over_all_places_is_another_figure() -> None:
    """The 5.16 that was trained and 4.46 that was served (docs/log.md): places after a long draft
    are skipped, so easy ones count for less."""
    easy, hard = [3, 2, 1, 0], [0] * 4
    accepted = (easy + hard) * 50
    random.seed(0)
    found = walk(accepted, [7] * (len(accepted) + 1 + 10), 10, len(accepted), None)
    assert (
        sum(found.everywhere) / len(found.everywhere)
        > sum(found.accepted) / len(found.accepted) + 0.1
    )
